"""A tiny random Llama as a GGUF file, written with the gguf package as llama.cpp's converter lays a model out."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaConfig, LlamaForCausalLM

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
WORDS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", *(chr(c) for c in range(33, 127)), "Ġ", "Ċ", "he", "hel")
MERGES = ("h e", "he l")
LAYERS, HEADS, KV_HEADS, WIDTH, INNER = 2, 4, 2, 64, 96

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rope_theta=10000.0,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(path: Path, model: LlamaForCausalLM, kind: Kind = Kind.F32, *, stretched: bool = False) -> Path:
    """`kind` is that of the matrices; norms are float32, as the converter writes them."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    if stretched:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(WORDS))
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template(CHAT)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            _add(writer, name, tensor.float().numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Kind) -> None:
    if name == "model.embed_tokens.weight":
        named = "token_embd.weight"
    elif name == "model.norm.weight":
        named = "output_norm.weight"
    else:
        _, _, block, rest = name.split(".", 3)
        named = f"blk.{block}.{_NAMES[rest.removesuffix('.weight')]}.weight"
    if named.endswith(
        ("attn_q.weight", "attn_k.weight")
    ):  # llama.cpp turns pairs of neighbours, the library turns halves
        heads = HEADS if "attn_q" in named else KV_HEADS
        halves = values.reshape(heads, 2, -1, values.shape[1])
        values = halves.swapaxes(1, 2).reshape(values.shape)
    if values.ndim == 1 or kind is Kind.F32:
        writer.add_tensor(named, values)
    elif kind is Kind.F16:
        writer.add_tensor(named, values.astype(np.float16))
    else:
        writer.add_tensor(named, gguf.quantize(values, kind), raw_dtype=kind)
