"""Wan's original layout: its transformer's names and config.json -> those of diffusers, which dit_wan.py uses.

    translate_key("blocks.7.self_attn.o.weight")           # blocks.7.attn1.to_out.0.weight

    python -m mirage_min.networks.wan_names                # both tables
"""

import re

CLASS_NAME = "WanTransformer3DModel"
# The original layout: {its layer or parameter: ours}, first those within "blocks.<i>.", then the others.
BLOCK_NAMES = {
    "modulation": "scale_shift_table",
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "norm3": "norm2",  # the second of the three
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
NAMES = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
FIELDS = {  # of the original config.json; its "dim" is num_heads times our attention_head_dim
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "freq_dim": "freq_dim",
    "ffn_dim": "ffn_dim",
    "num_layers": "num_layers",
    "eps": "eps",
}


def translate_key(name: str) -> str:
    """A tensor's name in the original layout -> its name here; any other name stays."""
    block, rest = re.fullmatch(r"(blocks\.\d+\.)?(.*)", name).groups(default="")
    names = BLOCK_NAMES if block else NAMES
    layer, _, parameter = rest.rpartition(".")
    if rest in names:
        return block + names[rest]
    return f"{block}{names[layer]}.{parameter}" if layer in names else name


def translate_config(config: dict) -> dict:
    """config.json of the original layout -> that of diffusers; any other stays. ValueError for a model that
    is not text-to-video or lacks a field."""
    if config.get("_class_name") != "WanModel":
        return config
    if config.get("model_type") not in ("t2v", "ti2v"):
        raise ValueError(f"WanDiT understands model_type as 't2v' or 'ti2v', got {config.get('model_type')!r}")
    if missing := {"dim", *FIELDS} - config.keys():
        raise ValueError(f"the config of a WanModel must have the fields {sorted(missing)}")
    rest = {name: config[name] for name in config.keys() - FIELDS.keys() - {"model_type", "dim", "text_len"}}
    return (rest | {ours: config[theirs] for theirs, ours in FIELDS.items()}
            | {"_class_name": CLASS_NAME, "attention_head_dim": config["dim"] // config["num_heads"]})


if __name__ == "__main__":
    for name in [f"blocks.7.{layer}.weight" for layer in BLOCK_NAMES] + [f"{layer}.weight" for layer in NAMES]:
        print(f"{name:40} {translate_key(name)}")
