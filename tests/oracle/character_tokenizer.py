"""A tokenizer of single ASCII characters for the tiny models, made on the spot."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["CHAT_TEMPLATE", "character_tokenizer"]

CHAT_TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}<assistant>"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Character ``c`` is token ``ord(c)``; other characters than ASCII are token 1, padding is 0 and the end 2."""
    vocabulary = {"<pad>": 0, "<unk>": 1, "<eos>": 2, **{chr(code): code for code in range(3, 128)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=4096
    )
