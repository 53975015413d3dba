"""Tiny random multimodal models whose language model can be rewritten, and prompts for them, with images and without.

Takes a wrapper's name, gives a float32 transformers model in eval mode, the same for the same name.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

from tests.families import FAMILIES, PLAIN, config_of, prompt

IMAGE = 100  # the token that stands for a piece of an image
SEEN = 4  # such tokens of one image
_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_QWEN_VISION = {
    "depth": 2, "num_heads": 2, "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A title; a configuration's type; the language model's type and options; the vision tower's; what else; how many
    tokens stand for an image."""

    title: str
    kind: str
    text: tuple[str, dict[str, Any]]
    vision: tuple[str, dict[str, Any]]
    others: dict[str, Any] = field(default_factory=dict)
    seen: int = SEEN


WRAPPERS: dict[str, Wrapper] = {
    "llava": Wrapper(
        "LLaVA",
        "llava",
        ("llama", PLAIN),
        ("clip_vision_model", {**_VISION, "projection_dim": 32}),
        {"image_token_index": IMAGE, "image_seq_length": SEEN, "vision_feature_layer": -1},
    ),
    "llava_next": Wrapper(
        "LLaVA-NeXT",
        "llava_next",
        ("llama", PLAIN),
        ("clip_vision_model", {**_VISION, "projection_dim": 32}),
        {"image_token_index": IMAGE, "image_grid_pinpoints": [[28, 28]], "vision_feature_layer": -1},
        10,  # a whole image, its one part, and an end of each row of that
    ),
    "vipllava": Wrapper(
        "ViP-LLaVA",
        "vipllava",
        ("llama", PLAIN),
        ("clip_vision_model", {**_VISION, "projection_dim": 32}),
        {"image_token_index": IMAGE, "image_seq_length": SEEN, "vision_feature_layers": [-1, -2]},
    ),
    "aya_vision": Wrapper(
        "Aya Vision",
        "aya_vision",
        ("cohere2", {**FAMILIES["cohere2"].options, "logit_scale": 1.0}),  # the wrapper leaves it out
        ("siglip_vision_model", {**_VISION, "patch_size": 7}),
        {"image_token_index": IMAGE, "downsample_factor": 2},
    ),
    "mistral3": Wrapper(
        "Mistral 3, Pixtral",
        "mistral3",
        ("mistral", {**PLAIN, "sliding_window": None}),
        ("pixtral", {**_VISION, "head_dim": 16}),
        {"image_token_index": IMAGE, "spatial_merge_size": 1, "vision_feature_layer": -1},
    ),
    "idefics3": Wrapper(
        "Idefics 3",
        "idefics3",
        ("llama", PLAIN),
        ("idefics3_vision", {**_VISION, "patch_size": 7}),
        {"image_token_id": IMAGE, "scale_factor": 2},
    ),
    "smolvlm": Wrapper(
        "SmolVLM",
        "smolvlm",
        ("llama", PLAIN),
        ("smolvlm_vision", {**_VISION, "patch_size": 7}),
        {"image_token_id": IMAGE, "scale_factor": 2},
    ),
    "internvl": Wrapper(
        "InternVL",
        "internvl",
        ("qwen2", PLAIN),
        ("internvl_vision", {**_VISION, "image_size": [28, 28], "patch_size": [7, 7]}),
        {"image_token_id": IMAGE, "image_seq_length": SEEN, "downsample_ratio": 0.5},
    ),
    "gemma3": Wrapper(
        "Gemma 3",
        "gemma3",
        ("gemma3_text", FAMILIES["gemma3"].options),
        ("siglip_vision_model", _VISION),
        {"image_token_index": IMAGE, "mm_tokens_per_image": SEEN},
    ),
    "qwen2_vl": Wrapper(
        "Qwen2-VL",
        "qwen2_vl",
        ("qwen2_vl_text", _QWEN),
        ("qwen2_vl_vision", {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}),
        {"image_token_id": IMAGE},
    ),
    "qwen2_5_vl": Wrapper(
        "Qwen2.5-VL",
        "qwen2_5_vl",
        ("qwen2_5_vl_text", _QWEN),
        ("qwen2_5_vl_vision", {**_QWEN_VISION, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 32}),
        {"image_token_id": IMAGE},
    ),
    "qwen3_vl": Wrapper(
        "Qwen3-VL",
        "qwen3_vl",
        ("qwen3_vl_text", {**_QWEN, "head_dim": 16}),
        (
            "qwen3_vl_vision",
            {
                **_QWEN_VISION,
                "hidden_size": 32,
                "out_hidden_size": 64,
                "intermediate_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        ),
        {"image_token_id": IMAGE},
    ),
}
# Their images a causal cache can hold.
CAUSAL = ("llava", "llava_next", "vipllava", "aya_vision", "mistral3", "idefics3", "smolvlm", "internvl")


def _paligemma() -> Any:
    text, vision = config_of("gemma", **PLAIN, head_dim=32).to_dict(), {"model_type": "siglip_vision_model", **_VISION}
    return CONFIG_MAPPING["paligemma"](text_config=text, vision_config=vision, image_token_index=IMAGE)


def _llama4() -> Any:
    vision = {**_VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    text = config_of("llama4_text").to_dict()
    return CONFIG_MAPPING["llama4"](text_config=text, vision_config={"model_type": "llama4_vision_model", **vision})


def _blip2() -> Any:
    formed = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return CONFIG_MAPPING["blip-2"](
        text_config=config_of("opt", **FAMILIES["opt"].options).to_dict(),
        vision_config={"model_type": "blip_2_vision_model", **_VISION},
        qformer_config={"model_type": "blip_2_qformer", "encoder_hidden_size": 32, "vocab_size": 128, **formed},
        num_query_tokens=SEEN,
        image_token_index=IMAGE,
    )


def _mllama() -> Any:
    text = config_of("mllama_text_model", cross_attention_layers=[1]).to_dict()
    vision = {"supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0], **_VISION}
    return CONFIG_MAPPING["mllama"](
        text_config=text, vision_config={"model_type": "mllama_vision_model", **vision}, image_token_index=IMAGE
    )


# A configuration of each wrapper that is refused, and words of the reason.
REFUSED = {"paligemma": (_paligemma, "in both directions"), "llama4": (_llama4, "chunk"), "mllama": (_mllama, "cross")}
# Its language model generates by itself, so that one is optimised.
INNER = _blip2


def wrapper_config(name: str) -> Any:
    wrapper = WRAPPERS[name]
    text, vision = (copy.deepcopy(part) for part in (wrapper.text, wrapper.vision))
    return CONFIG_MAPPING[wrapper.kind](
        text_config=config_of(text[0], **text[1]).to_dict(),
        vision_config={"model_type": vision[0], **vision[1]},
        **wrapper.others,
    )


def wrapper_model(name: str) -> PreTrainedModel:
    return random_wrapper(wrapper_config(name))


def random_wrapper(config: Any) -> PreTrainedModel:
    """A model with weights under which text, places and images matter."""
    model = AutoModelForImageTextToText.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if "norm" not in parameter:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def words(n: int, seed: int = 0) -> list[int]:
    """n token ids, none of an image."""
    return [t for t in prompt(n + 1, seed=seed) if t != IMAGE][:n]


def with_image(name: str, before: int = 3, after: int = 16, seed: int = 0) -> tuple[list[int], dict[str, Tensor]]:
    """A prompt's token ids around one image, and the image as the wrapper takes it."""
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    text = words(before + after, seed=seed)
    given = {"pixel_values": pixels}
    if name == "llava_next":
        given["pixel_values"] = torch.stack([pixels, pixels.flip(-1)], 1)
    if name in ("mistral3", "llava_next"):
        given["image_sizes"] = torch.tensor([[28, 28]])
    if name in ("idefics3", "smolvlm"):
        given["pixel_values"] = pixels[:, None]
    return text[:before] + [IMAGE] * WRAPPERS[name].seen + text[before:], given
