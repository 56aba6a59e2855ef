"""MkDocs hook: the executed notebooks, which ``make docs`` leaves in build/docs/notebooks, become pages of the site."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

BUILT = Path("build/docs/notebooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    folder = Path(config.config_file_path).parent / BUILT
    built = [path for path in folder.rglob("*") if path.is_file()]
    if not built:
        raise PluginError(f"{folder} holds no executed notebooks; 'make docs' makes them")
    for path in built:
        uri = f"notebooks/{path.relative_to(folder).as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files
