"""What the configs of SAE files say: per format, the fields that are read and those that are known to change nothing.

A field that stands in neither list is refused, by name: nobody here knows whether it changes what the numbers mean. So
is a known field with a value that its reader does not honour. How an SAE was trained does not matter; what was done to
its input does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clampdown.errors import CheckpointError, SaeError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TRAINING = _words(
    """act_store_device activations_mixing_fraction adam_beta1 adam_beta2 autocast autocast_lm aux_loss_coefficient
    b_dec_init_method batch_size buffer_size cached_activations_path checkpoint_path column_name compile_llm
    compile_sae context_size data_dir data_files dataset dataset_path dataset_trust_remote_code
    dead_feature_estimation_method dead_feature_threshold dead_feature_window decoder_heuristic_init
    decoder_heuristic_init_norm decoder_init_norm decoder_orthogonal_init device disable_concat_sequences dtype
    eval_batch_size_prompts eval_every_n_wandb_logs exclude_special_tokens expansion_factor feature_reinit_scale
    feature_sampling_method feature_sampling_window finetuning_method finetuning_tokens from_pretrained_path
    hf_hook_name hook_eval init_encoder_as_decoder_transpose is_dataset_tokenized jumprelu_bandwidth
    jumprelu_init_threshold jumprelu_sparsity_loss_mode jumprelu_ste_to_input jumprelu_tanh_scale l0_coefficient
    l0_warm_up_steps l1_coefficient l1_warm_up_steps llm_compilation_mode llm_device log_activations_store_to_wandb
    log_optimizer_state_to_wandb log_to_wandb log_weights_to_wandb logger lp_norm lr lr_decay_steps lr_end
    lr_scheduler_name lr_warm_up_steps matryoshka_widths model_batch_size model_class_name mse_loss_normalization
    n_batches_for_norm_estimate n_batches_in_buffer n_checkpoints n_eval_batches n_restart_cycles neuronpedia_id
    noise_density normalize_sae_decoder output_path pre_act_loss_coefficient prefetch_llm_batches prepend_bos resume
    resume_from_checkpoint run_name sae_compilation_mode sae_lens_training_version sae_lens_version
    save_final_checkpoint scale_sparsity_penalty_by_decoder_norm seed seqpos_slice sequence_separator_token
    sparsity_penalty split store_batch_size store_batch_size_prompts streaming target_l0 tokens_per_buffer
    tokens_per_optimizer_step topk_threshold_lr total_training_steps total_training_tokens train_batch_size
    train_batch_size_tokens training_architecture training_architecture_details training_tokens
    use_cached_activations use_chat_formatting use_ghost_grads use_matryoshka_aux_loss use_sparse_activations
    verbose wandb_entity wandb_id wandb_log_frequency wandb_project"""
)

SAELENS = _TRAINING | _words(
    """architecture d_in d_sae activation_fn activation_fn_str activation_fn_kwargs apply_b_dec_to_input
    normalize_activations reshape_activations rescale_acts_by_decoder_norm k hook_name hook_point hook_layer
    hook_point_layer hook_head_index hook_point_head_index hook_name_out hook_head_index_out model_name metadata
    model_revision grafted_from model_from_pretrained_kwargs finetuning_scaling_factor"""
)
"""Versions 2 to 6, under `metadata` too; before version 6 a config is that of the whole training run."""

MODEL_PROCESSING = _words(
    """center_writing_weights fold_ln center_unembed fold_value_biases refactor_factored_attn_matrices dtype
    torch_dtype device device_map n_devices n_ctx move_to_device default_prepend_bos default_padding_side
    first_n_layers local_files_only token trust_remote_code cache_dir attn_implementation low_cpu_mem_usage
    force_download output_attentions"""
)
"""How TransformerLens was told to load the model that the SAE was trained on. Only `center_writing_weights` changes the
residual stream at a site: norms and value biases are folded into what reads or follows."""

SPARSIFY = _words(
    """d_in num_latents expansion_factor k multi_topk normalize_decoder activation signed transcode skip_connection"""
)

DICTIONARY = _words("trainer buffer")
DICTIONARY_TRAINER = _words(
    """dict_class trainer_class activation_dim dict_size k layer lm_name submodule_name device seed lr steps
    warmup_steps decay_start resample_steps l1_penalty l1_warmup_steps sparsity_warmup_steps sparsity_penalty
    target_l0 bandwidth auxk_alpha aux_frac top_k_aux threshold_beta threshold_start_step group_fractions
    group_weights group_sizes active_groups k_anneal_steps wandb_name norm_factor p initial_sparsity_penalty
    lambda_reg bf16 momentum"""
)
"""`norm_factor` is among what changes nothing: the package multiplies it into the biases before it saves."""

LLAMA_SCOPE = _words(
    """hook_point_in hook_point_out d_model d_sae expansion_factor jump_relu_threshold dataset_average_activation_norm
    act_fn norm_activation use_decoder_bias apply_decoder_bias_to_pre_encoder use_glu_encoder
    sparsity_include_decoder_norm decoder_exactly_fixed_norm decoder_bias_init_method bias_init_method
    init_encoder_with_decoder_transpose init_decoder_norm init_encoder_norm init_search l1_coefficient
    l1_coefficient_warmup_steps l0_coefficient lp top_k k_warmup_steps k_warmup_steps_ratio use_batch_norm_mse
    use_ghost_grads tp_size ddp_size device seed dtype sae_pretrained_name_or_path strict_loading exp_factor
    remove_gradient_parallel_to_decoder_directions run_name wandb_project"""
)
GEMMA_SCOPE_2 = _words(
    """architecture model_name hf_hook_point_in hf_hook_point_out affine_connection layer site width l0 type name
    dtype"""
)

Allowed = Mapping[str, Sequence[Any]]
"""Fields that may say these values only."""


def check_fields(stated: Mapping[str, Any], known: frozenset[str], where: str, allowed: Allowed | None = None) -> None:
    """Raises `SaeError` for unknown fields that say something, and for known ones that say what is not honoured."""
    unknown = sorted(name for name, value in stated.items() if name not in known and value not in (None, {}, []))
    if unknown:
        raise SaeError(
            f"{where} has fields that are not known: {', '.join(name[:60] for name in unknown[:12])}",
            hint="they may change what the SAE's numbers mean; delete those that do not from a copy of the file",
        )
    for name, values in (allowed or {}).items():
        if name in stated and not any(stated[name] is value or stated[name] == value for value in values):
            raise SaeError(f"{where}: {name} is {stated[name]!r}, which is not supported here")


def count(stated: Mapping[str, Any], name: str, where: str) -> int:
    """A field that is a number of things. Raises `CheckpointError` for anything else."""
    if name not in stated:
        raise CheckpointError(f"{where} does not say '{name}'", hint=f"found: {', '.join(sorted(stated))[:300]}")
    value = stated.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        raise CheckpointError(f"{where}: {name} should be a positive whole number, it is {str(value)[:60]!r}")
    return value


def positive(stated: Mapping[str, Any], name: str, where: str) -> float:
    """A field that is a positive number. Raises `CheckpointError` for anything else."""
    value = stated.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise CheckpointError(f"{where}: {name} should be a positive number, it is {str(value)[:60]!r}")
    return float(value)


def table(stated: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """A field that holds fields; absent is empty. Raises `CheckpointError` for anything else."""
    value = stated.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise CheckpointError(f"{where}: {name} should be an object, it is {str(value)[:60]!r}")
    return value or {}


def text(stated: Mapping[str, Any], name: str, where: str) -> str | None:
    """A field that is text, or absent. Raises `CheckpointError` for anything else."""
    value = stated.get(name)
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{where}: {name} should be text, it is {str(value)[:60]!r}")
    return value


def switch(stated: Mapping[str, Any], name: str, where: str, *, absent: bool) -> bool:
    """A field that is true or false. Raises `CheckpointError` for anything else."""
    value = stated.get(name, absent)
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {name} should be true or false, it is {str(value)[:60]!r}")
    return value
