"""Which parallel sizes a model allows, and what a rank needs in device memory. Pure; formulas in model_shape.py."""

from __future__ import annotations

from dataclasses import dataclass

from megatoken.cluster.inventory.model_shape import GIB, ModelShape

# vLLM's own defaults, from its config package in the pinned version.
DEFAULT_UTILISATION = 0.92  # CacheConfig.gpu_memory_utilization
DEFAULT_BATCHED_TOKENS = 8192  # tokens of one step on a large device: SchedulerConfig's default for serving
# What a process holds before a weight is loaded: runtime context, collective buffers, captured graphs.
RUNTIME_BYTES = 3 * GIB // 2


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes on the device of the fullest rank."""

    weights: int
    workspace: int
    """Runtime, and the activations of one full step."""
    kv_per_token: int
    kv_least: int
    """KV cache of one request of full length: with less, vLLM refuses to start."""
    utilisation: float

    @property
    def device(self) -> int:
        """The device memory a rank asks for: vLLM plans inside `utilisation` of the device."""
        return int((self.weights + self.workspace + self.kv_least) / self.utilisation)

    def kv_tokens(self, device_bytes: int) -> int:
        """Tokens of KV cache that a device of that size leaves room for; 0 or less: it does not fit."""
        room = int(device_bytes * self.utilisation) - self.weights - self.workspace
        return room // self.kv_per_token if self.kv_per_token else 0


def parallel_problems(
    shape: ModelShape, *, tensor: int = 1, pipeline: int = 1, data: int = 1, expert: int = 1
) -> tuple[str, ...]:
    """What is wrong with the sizes for this model: "parallel.tensor: 2 is not allowed; ...". Empty: nothing."""
    problems = []
    if not _tensor_fits(shape, tensor):
        allowed = ", ".join(str(size) for size in tensor_sizes(shape))
        problems.append(
            f"parallel.tensor: {tensor} is not allowed; it must divide {shape.heads} attention heads and go evenly "
            f"with {shape.kv_heads} KV heads: one of {allowed}"
        )
    if pipeline > shape.layers:
        problems.append(f"parallel.pipeline: {pipeline} is not allowed; at most the {shape.layers} layers")
    if expert > 1 and not shape.experts:
        problems.append(f"parallel.expert: {expert} is not allowed; the model has no experts, so 1")
    elif expert > max(shape.experts, 1):
        problems.append(f"parallel.expert: {expert} is not allowed; at most the {shape.experts} experts")
    if data < 1:
        problems.append(f"parallel.data: {data} is not allowed; at least 1")
    return tuple(problems)


def tensor_sizes(shape: ModelShape) -> tuple[int, ...]:
    """Every TP size that the model's heads allow, rising."""
    return tuple(size for size in range(1, shape.heads + 1) if _tensor_fits(shape, size))


def _tensor_fits(shape: ModelShape, tensor: int) -> bool:
    """vLLM: heads divide evenly; KV heads divide evenly, or are replicated evenly when TP exceeds them."""
    if tensor < 1 or shape.heads % tensor:
        return False
    if shape.latent_kv:
        return True  # the latent is on every rank
    return shape.kv_heads % tensor == 0 or tensor % shape.kv_heads == 0


def stage_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each pipeline stage, as vllm.distributed.utils.get_pp_indices splits them."""
    counts = [layers // stages] * stages
    for back in range(2, layers % stages + 2):
        counts[-back] += 1
    return tuple(counts)


def memory_need(
    shape: ModelShape,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    max_model_len: int | None = None,
    utilisation: float = DEFAULT_UTILISATION,
    batched_tokens: int = DEFAULT_BATCHED_TOKENS,
    runtime_bytes: int = RUNTIME_BYTES,
) -> MemoryNeed:
    """The need of the rank that needs most. Data-parallel copies need the same again, on their own devices."""
    stages = stage_layers(shape.layers, pipeline)
    scale = shape.total_bytes / max(_all_weights(shape), 1) if shape.total_bytes else 1.0
    weights = max(_stage_weights(shape, number, stages, tensor) for number in range(pipeline)) * scale
    kv_layer = shape.latent_kv or 2 * _kv_heads(shape, tensor) * shape.head_dim
    kv_token = int(kv_layer * shape.cache_bytes * max(stages))
    length = max_model_len or shape.max_positions or 2048
    wide = max(2 * shape.intermediate // tensor, 4 * shape.hidden)  # the MLP's two inner rows, or residual copies
    activations = batched_tokens * wide * 2 + 1024 * (shape.vocab // tensor) * 4  # logits of 1,024 requests, float32
    return MemoryNeed(int(weights), runtime_bytes + activations, kv_token, kv_token * length, utilisation)


def weight_total(shape: ModelShape) -> int:
    """Bytes of all weights, once."""
    return shape.total_bytes or int(_all_weights(shape))


def active_bytes(shape: ModelShape) -> float:
    """Bytes of weights that one token's decode step reads: all, but for the experts it does not go to."""
    if not shape.experts or not shape.active_experts:
        return float(weight_total(shape))
    idle = shape.experts - shape.active_experts
    expert_layers = shape.layers - shape.dense_layers
    return (
        weight_total(shape) - idle * expert_layers * 3 * shape.hidden * shape.expert_intermediate * shape.weight_bytes
    )


def _kv_heads(shape: ModelShape, tensor: int) -> int:
    return max(1, shape.kv_heads // tensor)


def _all_weights(shape: ModelShape) -> float:
    return _stage_weights(shape, 0, (shape.layers,), 1)


def _stage_weights(shape: ModelShape, number: int, stages: tuple[int, ...], tensor: int) -> float:
    first = sum(stages[:number])
    layers = range(first, first + stages[number])
    dense = sum(layer < shape.dense_layers or not shape.experts for layer in layers)
    embedding = shape.vocab * shape.hidden * shape.cache_bytes / tensor  # kept unquantised
    total = sum(_attention(shape, tensor) for _ in layers) * shape.weight_bytes
    total += dense * 3 * shape.hidden * shape.intermediate / tensor * shape.weight_bytes
    total += (len(layers) - dense) * _experts(shape, tensor)
    total += embedding if number == 0 else 0
    own_head = not shape.tied_head or len(stages) > 1
    return total + (embedding if number == len(stages) - 1 and own_head else 0)


def _attention(shape: ModelShape, tensor: int) -> float:
    """Weights of one layer's attention on one rank."""
    heads = shape.heads * shape.head_dim / tensor
    if shape.latent_kv:
        down = shape.hidden * (shape.latent_kv + shape.latent_q)
        query = (shape.latent_q or shape.hidden) * heads * 1.5  # the rope part of each head is half its other part
        return down + query + shape.latent_kv * heads * 2 + shape.hidden * heads
    return 2 * shape.hidden * heads + 2 * shape.hidden * _kv_heads(shape, tensor) * shape.head_dim


def _experts(shape: ModelShape, tensor: int) -> float:
    """Bytes of one layer's experts, shared experts and expert router on one rank."""
    copies = shape.experts + shape.shared_experts
    router = shape.hidden * shape.experts * shape.cache_bytes
    return copies * 3 * shape.hidden * shape.expert_intermediate / tensor * shape.weight_bytes + router
