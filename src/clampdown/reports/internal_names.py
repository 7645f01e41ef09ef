"""Names of scores, settings and provenance as words: files keep the short names, people read these.

A name without an entry is shown with spaces for its underscores.
"""

from __future__ import annotations

WORDS = {
    # scores of features
    "validation_refusal": "refusals on validation prompts",
    "clamp_refusal_at_kl": "refusal gained at equal KL",
    "clamp_refusal_log_odds": "refusal log-odds gained",
    "clamp_strength": "clamped to",
    "clamp_kl": "KL of that clamp",
    "diff_mean": "difference of means",
    "norm_diff_mean": "difference of means, scaled",
    "norm_var": "variance, scaled",
    "strategy": "direction (−1: more on harmful)",
    "auroc": "AUROC",
    "d_prime": "d′",
    "q_value": "q-value",
    "alignment": "cosine with the difference of means",
    "firing_rate_harmful": "fires on harmful",
    "firing_rate_harmless": "fires on harmless",
    # settings of finders
    "w_diff": "weight of the difference",
    "w_var": "weight of the variance",
    "literal": "formula exactly as published",
    "min_firing_rate": "fires at least this often",
    "top": "features kept",
    "kl": "KL at which clamps are compared",
    "benign": "benign prompts per clamp",
    "clamped": "features clamped",
    "attributed": "features attributed",
    # provenance and choices
    "prompts_hash": "hash of the prompts",
    "code_version": "clampdown",
    "sae": "SAE",
    "sae_revision": "SAE's revision",
    "model_revision": "model's revision",
    "resume_key": "key of the run",
    "gated_arm": "arm behind a gate",
    "strength_note": "that is",
    "n_calibration": "calibration prompts",
    "as_far": "random features that refuse as much",
}
TRUTH = {"True": "yes", "False": "no"}


def in_words(name: str) -> str:
    """A short name in words."""
    return WORDS.get(name, name.replace("_", " "))
