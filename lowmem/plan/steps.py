"""Models one step of decoding or of a prompt, in milliseconds.

Floors are bytes over bandwidth and operations over rate. Expectations add calibration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lowmem.inputs.model_cards import DTYPE_BYTES
from lowmem.plan.calibration import constant
from lowmem.plan.engine_config import EngineConfig
from lowmem.plan.memory import CardMemory
from lowmem.plan.reads import StepWeights, expert_share, step_weights
from lowmem.plan.speculation import acceptance_of
from lowmem.plan.stages import Part, hop_bytes_per_token
from lowmem.plan.weights import streamed_layers
from lowmem.schema import Device, Link, Load, ModelCard
from lowmem.units import GB


def _figure(section: str, kernel: str, device: Device) -> float:
    """Return the measured figure of a kernel.

    The most specific one counts: for this card, for its compute capability, for the kernel alone, or for any.
    """
    table = constant("latency", section)
    keys = (f"{kernel}@{device.name}", f"{kernel}@{device.capability}", kernel, "any")
    return float(next(table[key] for key in keys if key in table))


@dataclass(frozen=True)
class Hops:
    """Time of a step's way from stage to stage, in milliseconds.

    `floor` is physics and `expected` is calibrated. `out` is how long a stage waits before its next step may
    begin.
    """

    floor: float
    expected: float
    out: float


def hops(card: ModelCard, engine: EngineConfig, device: Device, link: Link | None, tokens: float) -> Hops:
    """Compute the hand-overs of a step of `tokens` tokens, and the way of the sampled tokens back to the
    first stage.

    A boundary inside a host is a copy from card to card. A stage's next step waits until the one before is
    sent (0.32.0, gpu_worker.py).
    """
    if engine.pp == 1:
        return Hops(0.0, 0.0, 0.0)
    size = tokens * hop_bytes_per_token(card, engine)
    inside = (engine.pp - engine.hosts) * size / (device.peer_gb_per_s * GB / 1e3)
    beside: dict[str, float] = constant("latency", "hop_ms")
    if link is None:
        return Hops(inside, inside + engine.pp * beside["host"], inside / (engine.pp - 1))
    kind = "rdma" if link.rdma else "tcp"
    wire, one_way = size / (link.gb_per_s * GB / 1e3), link.round_trip_us / 2e3
    own, seen = beside[kind], wire / float(constant("latency", "network_efficiency")[kind])
    between = engine.hosts - 1
    return Hops(
        floor=inside + between * (wire + one_way) + one_way,
        expected=inside
        + (engine.pp - engine.hosts) * beside["host"]
        + between * (seen + one_way + own)
        + one_way
        + own,
        out=seen,
    )


@dataclass(frozen=True)
class StepModel:
    """Steps of an engine under a load.

    The engine takes a request again only every `pp` steps. It does not split decoding requests evenly between
    the steps in flight (0.32.0, async_scheduler.py).
    """

    card: ModelCard
    engine: EngineConfig
    device: Device
    stages: Sequence[tuple[Part, CardMemory]]
    load: Load
    link: Link | None = None  # between the hosts; None: there is one host

    @cached_property
    def together(self) -> int:
        """Count the requests that decode in one step."""
        held = self.stages[0][1].kv.requests_of(self.engine.held_tokens(self.load))
        return min(self.load.clients, self.engine.max_num_seqs, held or self.load.clients)

    @cached_property
    def accepted(self) -> float:
        """Return the mean tokens that a step gives a request: 1 without speculation."""
        return acceptance_of(self.load, self.engine.speculation)[0]

    @property
    def decode_tokens(self) -> int:
        """Count the tokens of a step that has only decoding requests, with their drafts."""
        return self.together * self.engine.rows

    @property
    def chunk_tokens(self) -> int:
        """Count the tokens of a prompt in one step."""
        return min(self.engine.max_num_batched_tokens, self.load.input_tokens)

    @property
    def chunks(self) -> int:
        """Count the steps of one prompt."""
        return math.ceil(self.load.input_tokens / self.engine.max_num_batched_tokens)

    @property
    def mixed_tokens(self) -> int:
        """Count the tokens of a step that has a chunk of a prompt beside the decoding requests."""
        return min(self.chunk_tokens + self.decode_tokens, self.engine.max_num_batched_tokens)

    @property
    def fixed(self) -> float:
        """Return the time that a step takes whatever its size.

        With n-gram drafts the host makes them between two steps, and schedules the next one only then.
        """
        between = float(constant("latency", "draft_ms")["step"]) if self.engine.speculation else 0.0
        return float(constant("latency" if self._cuda else "cpu", "step_ms")) + between

    @property
    def flops_per_ms(self) -> float:
        """Return the operations per millisecond of the cards that share a layer."""
        return self.device.fp16_tflops * 1e12 / 1e3 * self.engine.tp

    @property
    def _cuda(self) -> bool:
        return self.device.kind == "cuda"

    @property
    def _new(self) -> bool:
        return self.engine.vllm >= (0, 28, 0)

    def weights(self, stage: tuple[Part, CardMemory]) -> StepWeights:
        """Return the weights of one card of a stage by the kernel that reads them."""
        return step_weights(stage[0].card, self.engine, stage[1].weights)

    def operations(self, stage: tuple[Part, CardMemory], tokens: float) -> tuple[float, float]:
        """Return the time of the products with weights at full rate: outside of experts, and inside."""
        w = self.weights(stage)
        times = 2 * tokens / self.flops_per_ms
        return w.dense_parameters * times, w.expert_parameters * times

    def work(self, stage: tuple[Part, CardMemory], tokens: float, sequences: float) -> dict[str, float]:
        """Compute the floors of a step of `tokens` tokens on one stage, by term."""
        weights, hbm = stage[1].weights, self.device.hbm_gb_per_s * GB / 1e3  # bytes per ms
        return {
            "hbm_weights": self.weights(stage).read(expert_share(self.card, tokens)) / hbm,
            "hbm_kv": self.kv_bytes(stage, sequences) / hbm,
            "link_offload": weights.offloaded / (self.device.link_gb_per_s * GB / 1e3),
            "flops": sum(self.operations(stage, tokens)),
        }

    def kv_bytes(self, stage: tuple[Part, CardMemory], sequences: float) -> int:
        """Return the bytes of keys, values and states that a step reads on one card.

        A request is in the middle of its answer on average.
        """
        kv, context = stage[1].kv, self.load.input_tokens + self.load.output_tokens // 2
        return round(kv.layout.bytes_read(context, kv.layers) * sequences)

    def _reading(self, stage: tuple[Part, CardMemory], tokens: float) -> float:
        """Return the expected time to read the weights, each by its kernel."""
        w, device = self.weights(stage), self.device
        hbm = device.hbm_gb_per_s * GB / 1e3
        experts = w.experts * expert_share(self.card, tokens)
        dense = w.plain / _figure("hbm_efficiency", self._plain_kernel, device)
        dense += (w.quantized - w.offloaded) / _figure("hbm_efficiency", self.engine.kernel, device)
        return (
            max(0.0, dense) + experts / _figure("expert_hbm_efficiency", self.engine.expert_kernel, device)
        ) / hbm

    def _multiplying(self, stage: tuple[Part, CardMemory], tokens: float) -> float:
        """Return the expected time of the products with weights, each by its kernel."""
        dense, experts = self.operations(stage, tokens)
        return dense / _figure("flop_efficiency", self.engine.kernel, self.device) + experts / _figure(
            "expert_flop_efficiency", self.engine.expert_kernel, self.device
        )

    @property
    def _plain_kernel(self) -> str:
        return "cpu" if self.device.kind == "cpu" else "native16"

    def floor(self, stage: tuple[Part, CardMemory], tokens: float, sequences: float) -> float:
        """Return the least time of a step on one stage."""
        t = self.work(stage, tokens, sequences)
        return max(t["hbm_weights"] + t["hbm_kv"], t["link_offload"], t["flops"])

    def all_reduces(self, stage: tuple[Part, CardMemory], tokens: int) -> float:
        """Return the time of the sums across the cards that share a layer, two a layer."""
        engine, device = self.engine, self.device
        if engine.tp == 1:
            return 0.0
        wire = tokens * self.card.hidden_size * DTYPE_BYTES[engine.dtype] / (device.peer_gb_per_s * GB / 1e3)
        own = "graph" if engine.custom_all_reduce else "graph_by_nccl"
        over = (
            "eager"
            if engine.eager and not self._new
            else own
            if device.peer_gb_per_s > device.link_gb_per_s
            else "graph_over_pcie"
        )
        return 2 * stage[0].card.layers * (float(constant("latency", "all_reduce_ms")[over]) + wire)

    def launches(self, stage: tuple[Part, CardMemory]) -> float:
        """Return the time of kernel launches by the host, which captured graphs avoid."""
        each = float(constant("latency", "eager_ms_per_layer"))
        each *= _figure("eager_host_share", "any", self.device)
        return stage[0].card.layers * each if self.engine.eager and self._cuda else 0.0

    def _beside(self, stage: tuple[Part, CardMemory], tokens: int) -> float:
        """Return the time that layers take beside their matrix products.

        A layer of experts also routes, and one with a state or latent vectors has more and smaller kernels. A
        quantized KV cache of few bits is packed and unpacked by kernels of its own.
        """
        if not self._cuda:
            return 0.0
        layers, kv_dtype, kv = stage[0].card.layers, self.engine.kv_dtype, stage[1].kv
        more = constant("latency", "other_layer_ms")
        other = kv.layout.layers_with("mamba", layers=kv.layers) * float(more["state"])
        other += kv.layout.layers_with("mla", "sliding_mla", layers=kv.layers) * float(more["latent"])
        few_bits = float(constant("latency", "kv_ms_per_layer").get(kv_dtype, 0.0))
        few_bits += tokens * float(constant("latency", "kv_us_per_layer_token").get(kv_dtype, 0.0)) / 1e3
        each = _figure("graph_ms_per_layer", self.engine.kernel, self.device) + few_bits
        routing = _figure("expert_ms_per_layer", self.engine.expert_kernel, self.device)
        return layers * each + stage[1].weights.expert_layers * routing + other

    def _drafts(self, layers: int) -> float:
        """Return the time that the draft rows of the decoding requests take beside their matrix products."""
        rows = self.decode_tokens - self.together
        return rows * layers * float(constant("latency", "draft_ms")["row_and_layer"]) if self._cuda else 0.0

    def _attention(self, stage: tuple[Part, CardMemory], tokens: int) -> float:
        """Return the time of a prompt's products with keys and values.

        Each token meets half of the prompt on average, up to a layer's window. No weights are in these
        products.
        """
        if not self._cuda:
            return 0.0
        kv, half = stage[1].kv, self.load.input_tokens / 2
        met = kv.layout.tokens_met(half, kv.layers) if kv.layout.groups else half * stage[0].card.layers
        operations = 4 * self.card.heads * self.card.head_dim * tokens * met
        return operations / self.flops_per_ms / _figure("attention_efficiency", "any", self.device)

    def _latent_attention(self, stage: tuple[Part, CardMemory]) -> float:
        """Return the time of a decode step's products with latent vectors.

        Every head multiplies with the same vector, which makes these products long. Each number of a vector
        is multiplied for the scores and again for the sum.
        """
        kv, context = stage[1].kv, self.load.input_tokens + self.load.output_tokens // 2
        size = 1 if self.engine.kv_dtype.startswith("fp8") else DTYPE_BYTES[self.engine.dtype]
        numbers = kv.layout.latent_bytes(context, kv.layers) / size
        operations = 4 * self.card.heads * numbers * self.decode_tokens
        return operations / self.flops_per_ms / _figure("attention_efficiency", "any", self.device)

    def expected(self, stage: tuple[Part, CardMemory], tokens: int) -> float:
        """Return one stage's expected time for a step of `tokens` tokens.

        Tokens beyond those of the decoding requests belong to a prompt.
        """
        name, layers = self.engine.kernel, stage[0].card.layers
        t = self.work(stage, tokens, self.together)
        prompt = max(0, tokens - self.decode_tokens)
        rows = max(tokens, int(constant("latency", "least_prompt_rows").get(name, 0))) if prompt else tokens
        gpu = (
            self._beside(stage, tokens)
            + self._drafts(layers)
            + self._attention(stage, prompt)
            + max(
                self._reading(stage, tokens) + max(t["hbm_kv"], self._latent_attention(stage)),
                self._multiplying(stage, rows),
            )
        )
        link = constant("latency", "link_efficiency")
        if self.engine.offload == "prefetch":  # copies run beside the layers that compute
            # Only the first of several layers in a row that stay on the card has a copy to run beside it.
            staying = 1 - streamed_layers(self.engine, stage[0].card) / layers
            body = max(gpu, t["link_offload"] / link["prefetch"] + gpu * staying)
        else:  # UVA reads happen inside the kernels, again for every tile of rows
            tiles = math.ceil(tokens / constant("latency", "uva_tile_tokens").get(name, 256))
            body = gpu + tiles * t["link_offload"] / link["uva"]
        return float(max(body, self.launches(stage)) + self.all_reduces(stage, tokens))

    def hops(self, tokens: float) -> Hops:
        """Compute the way of a step of `tokens` tokens from stage to stage."""
        return hops(self.card, self.engine, self.device, self.link, tokens)

    def through(self, tokens: int) -> float:
        """Return the time from the start of a step until its sampled tokens are back."""
        return sum(self.expected(s, tokens) for s in self.stages) + self.hops(tokens).expected + self.fixed

    def slot(self, tokens: int) -> float:
        """Return the time from one step to the next in a full pipeline.

        A single stage takes the step itself.
        """
        return max(self.expected(s, tokens) for s in self.stages) + self.hops(tokens).out + self.fixed

    def decode_floor(self, batches: int) -> float:
        """Return the least time of a token with the decoding requests split evenly between `batches` steps in
        flight.
        """
        share = self.together / batches
        tokens = share * self.engine.rows
        each = [self.floor(s, tokens, share) for s in self.stages]
        return max(sum(each) + self.hops(tokens).floor, batches * max(each)) / self.accepted

    def prefill_floor(self, stage: tuple[Part, CardMemory]) -> float:
        """Return the least time of one prompt on one stage."""
        t = self.work(stage, self.chunk_tokens, self.together)
        return max(
            sum(self.operations(stage, self.load.input_tokens)),
            self.chunks * t["hbm_weights"],
            self.chunks * t["link_offload"],
        )
