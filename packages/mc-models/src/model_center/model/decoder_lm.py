"""The decoder skeleton: a causal stack and a projection onto the vocabulary."""

from typing import Any

from torch import Tensor

from model_center.layer import AttentionMask, KeyValueCache, StackOutput
from model_center.model.outputs import BaseModelOutputWithPastAndCrossAttentions, ModelOutput
from model_center.model.projection_head import ProjectionHead
from model_center.model.stack_model import StackConfig, StackModel


class DecoderLM(ProjectionHead, StackModel):
    """A decoder. Its stack is called `encoder`, as in existing checkpoints."""

    config: StackConfig

    def __init__(self, config: StackConfig) -> None:
        super().__init__(config)
        self.add_head(config)

    @property
    def causal(self) -> bool:
        """Always."""
        return True

    def forward(  # type: ignore[override] # decoders have fewer documented arguments
        self,
        input_ids: Tensor | None = None,
        length: Tensor | None = None,
        attention_mask: Tensor | AttentionMask | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool = True,
        return_logits: bool = False,
        **options: Any,
    ) -> ModelOutput | tuple[Any, ...] | Tensor:
        """Runs the model: `StackModel.forward`, of whose arguments those for cross-attention are left to `options`."""
        return super().forward(
            input_ids,
            length,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            return_logits=return_logits,
            **options,
        )

    def add_token_types(self, hidden_states: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Adds the input embeddings of `token_type_ids`, if there are any."""
        return hidden_states if token_type_ids is None else hidden_states + self.input_embedding(token_type_ids)

    def outputs(self, output: StackOutput, cache: KeyValueCache | None) -> BaseModelOutputWithPastAndCrossAttentions:
        """The output object, with the cache."""
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=output.last_hidden_state,
            past_key_values=cache,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            cross_attentions=output.cross_attentions,
        )
