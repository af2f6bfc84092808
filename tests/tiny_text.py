"""Tokenizers and text encoders made from nothing: trained on a few sentences, random weights, no downloads.

The words of Qwen's prompt templates are in the corpus, so that the templates take about as many tokens as they do with
the real tokenizer: the pipelines cut them off by count.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)
CORPUS = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain",
    "how the user's text instruction should alter or modify the image. Generate a new image that meets the user's",
    "requirements while maintaining consistency with the original input where appropriate. Describe the image by",
    "detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects and background:",
    "system user assistant Picture a photo of a cat dog house tree, remove the person, make it night, replace the sky",
    "add red hat, low quality, blurry",
)
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CHAT = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n'}}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

warnings.filterwarnings("ignore", category=FutureWarning)


def byte_pairs(corpus: Sequence[str], splitter: Any, suffix: str | None) -> tuple[dict[str, int], list[Any], list[str]]:
    """Vocabulary, merges and alphabet of a byte-level BPE trained on the corpus."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    ending = {"end_of_word_suffix": suffix} if suffix else {}
    tokenizer = Tokenizer(models.BPE(**ending))
    tokenizer.pre_tokenizer = splitter
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, show_progress=False, min_frequency=1, **ending
    )
    tokenizer.train_from_iterator(list(corpus) * 4, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    return model["vocab"], merges, alphabet


def clip_tokenizer() -> Any:
    from tokenizers import Regex, pre_tokenizers
    from transformers import CLIPTokenizer

    splitter = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    learned, merges, alphabet = byte_pairs([line.lower() for line in CORPUS], splitter, "</w>")
    words = dict.fromkeys([*alphabet, *(letter + "</w>" for letter in alphabet), *learned])
    words |= dict.fromkeys(["<|startoftext|>", "<|endoftext|>"])  # the end last: CLIP pools at the largest id
    return CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=merges, model_max_length=77)


def qwen_tokenizer() -> Any:
    from tokenizers import Regex, pre_tokenizers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    splitter = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    vocabulary, merges, _ = byte_pairs(CORPUS, splitter, None)
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, model_max_length=32768, additional_special_tokens=list(QWEN_SPECIAL[1:]),
        eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT,
    )


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    vocabulary = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "\u2581": -2.0}
    vocabulary |= {"\u2581" + word: -3.0 for word in sorted({word for line in CORPUS for word in line.split()})}
    vocabulary |= {letter: -8.0 for letter in map(chr, range(33, 127)) if letter not in vocabulary}
    vocabulary |= {f"<extra_id_{number}>": 0.0 for number in range(99, -1, -1)}
    return T5Tokenizer(vocab=list(vocabulary.items()), model_max_length=512)


def clip_text(tokenizer: Any, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=32, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, hidden_act="quick_gelu",
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_text(tokenizer: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )).eval()


def qwen3_text(tokenizer: Any) -> Any:
    """Flux.2 Klein's: it reads the hidden states of three layers, up to the 27th."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=28, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=4096,
    )).eval()


def qwen_vision_text(tokenizer: Any) -> Any:
    """Qwen-Image's encoder, which reads pictures too."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    number = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32768,
            "rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1e6},
            "bos_token_id": number("<|endoftext|>"), "eos_token_id": number("<|im_end|>"),
            "pad_token_id": number("<|endoftext|>"),
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
            "fullatt_block_indexes": [1], "window_size": 112,
        },
        image_token_id=number("<|image_pad|>"), video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"), vision_end_token_id=number("<|vision_end|>"),
    )).eval()
