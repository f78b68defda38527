"""transformers: the layer of Swin, whose map comes as a row of tokens beside its numbers of rows and columns."""

import torch
from torch import Tensor, nn
from transformers.models.swin import modeling_swin

from vit_fast.foreign.block import SYMBOL, AttentionHalf, MlpHalf, WindowedBlock, Windows, why_other_distances
from vit_fast.foreign.transformers import ACTIVATION, ACTIVATIONS, half_of_attention, why_more, why_other, why_set
from vit_fast.layers import DROPOUT, LINEAR, NORM, readable, why_aside
from vit_fast.transformers_attention import wants_weights

if hasattr(modeling_swin, "SwinRelativePositionBias"):  # what transformers had before is made of other parts
    _ATTENTION = readable(modeling_swin.SwinAttention)
    _BIAS = readable(modeling_swin.SwinRelativePositionBias)
    _MLP = readable(modeling_swin.SwinMLP)
    _PATH = (nn.Identity, *readable(modeling_swin.SwinDropPath))

    class SwinLayer(WindowedBlock, modeling_swin.SwinLayer):
        helpers = ("set_shift_and_window_size", "get_attn_mask", "maybe_pad", "cyclic_shift")
        changed_by_calls = ("shift_size", "window_size")

        def never(self, inside: tuple[nn.Module, ...] = ()) -> str:
            bias = getattr(self.attention, "relative_position_bias", None)
            if type(bias) not in _BIAS:
                return ""
            return why_other_distances(bias.relative_position_index, bias.window_size)

        def forward(
            self,
            hidden_states: Tensor,
            input_dimensions: tuple[int, int],
            always_partition: bool = False,
            **kwargs,
        ) -> tuple[Tensor, Tensor | None]:
            more = why_more(kwargs) if isinstance(hidden_states, Tensor) else SYMBOL
            asides = (more, more) if more else self.asides()
            if self.is_aside(asides):
                return super().forward(hidden_states, input_dimensions, always_partition, **kwargs)
            if not always_partition:
                self.set_shift_and_window_size(input_dimensions)  # which stays so, as in the library's own code
            x = self.reads(hidden_states, input_dimensions)
            attention = asides[0] or self.map_aside(x)
            if not attention and wants_weights(self.attention, kwargs.get("output_attentions")):
                attention = "attentions are asked for"
            weights: list[Tensor | None] = []
            x = self.fused(x, (attention, asides[1]), weights=weights, **kwargs)
            return x.flatten(1, 2), weights[0] if weights else None

        def reads(self, x: Tensor, *others) -> Tensor:
            return x.unflatten(1, others[0])

        def attention_aside(self) -> str:
            attention = self.attention
            for name in self.helpers:
                if reason := self.why_helper(name):
                    return reason
            if reason := why_aside(("attention", attention, _ATTENTION)) or why_other(attention):
                return reason
            if attention.config._attn_implementation in (None, "eager"):
                return "attention is eager, which returns its weights"
            if reason := why_set("attention", attention, "attention_dropout"):
                return reason
            if torch.jit.is_tracing():
                return "torch.jit traces it"
            linears = ("q_proj", "k_proj", "v_proj", "o_proj")
            return why_aside(
                ("layernorm_before", self.layernorm_before, NORM),
                *((f"attention.{name}", attention._modules[name], LINEAR) for name in linears),
                ("attention.relative_position_bias", attention.relative_position_bias, _BIAS),
                ("dropout", self.dropout, DROPOUT),
                ("drop_path", self.drop_path, _PATH),
            )

        def windows(self) -> Windows:
            table = self.attention.relative_position_bias.relative_position_bias_table
            return Windows(table, (self.window_size, self.window_size), (self.shift_size, self.shift_size))

        def heads(self) -> tuple[int, int]:
            attention = self.attention
            return len(attention.q_proj.weight) // attention.head_dim, attention.head_dim

        def attention_half(self) -> AttentionHalf:
            norm, attention = self.layernorm_before, self.attention
            return half_of_attention(norm, attention, attention.o_proj, path=self.drop_path, windows=self.windows())

        def own_attention(self, x: Tensor, weights: list[Tensor | None] | None = None, **kwargs) -> Tensor:
            """As the library's forward has it; its weights are appended to those."""
            rows, columns = x.shape[1:3]
            side, tokens = self.window_size, x.flatten(1, 2)
            y, _ = self.maybe_pad(self.layernorm_before(tokens).view(x.shape), rows, columns)
            high, wide = y.shape[1:3]
            cut = modeling_swin.window_partition(self.cyclic_shift(y), side).view(-1, side * side, x.shape[-1])
            mask = self.get_attn_mask(high, wide, dtype=y.dtype, device=y.device)
            y, found = self.attention(cut, mask, **kwargs)
            if weights is not None:
                weights.append(found)
            y = self.dropout(y).view(-1, side, side, x.shape[-1])
            y = self.cyclic_shift(modeling_swin.window_reverse(y, side, high, wide), reverse=True)
            return self.drop_path(y[:, :rows, :columns].reshape(tokens.shape)).view(x.shape)

        def mlp_aside(self) -> str:
            mlp = self.mlp
            return why_aside(("mlp", mlp, _MLP)) or why_aside(
                ("layernorm_after", self.layernorm_after, NORM),
                ("mlp.fc1", mlp.fc1, LINEAR),
                ("mlp.activation_fn", mlp.activation_fn, ACTIVATIONS),
                ("mlp.fc2", mlp.fc2, LINEAR),
                ("dropout", self.dropout, DROPOUT),
            )

        def mlp_half(self) -> MlpHalf:
            mlp = self.mlp
            activation = ACTIVATION[type(mlp.activation_fn)]
            return MlpHalf(self.layernorm_after, (mlp.fc1.weight,), (mlp.fc1.bias,), activation, mlp.fc2)

        def own_mlp(self, x: Tensor) -> Tensor:
            return self.dropout(self.mlp(self.layernorm_after(x.flatten(1, 2)))).view(x.shape)
