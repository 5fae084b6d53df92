"""How softmax(scale * Q K^T + M) V is computed: one public function, one file a backend."""

from spatial_decay.ops.attention import attention_weights, decay_attention, explain_backend
from spatial_decay.ops.choice import BACKENDS, Backend

__all__ = ["BACKENDS", "Backend", "attention_weights", "decay_attention", "explain_backend"]
