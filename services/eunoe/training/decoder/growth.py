"""Makes a trained decoder deeper without changing what it computes."""

from dataclasses import replace

import torch

from eunoe.training.decoder.differentiable import NanoDecoder


def grown(model: NanoDecoder, num_layers: int, generator: torch.Generator) -> NanoDecoder:
    """A deeper copy: new layers, whose output projections are zero, spread evenly between the trained ones.

    Raises:
        ValueError: If `num_layers` is not a multiple of the model's.
    """
    ratio, remainder = divmod(num_layers, model.config.num_layers)
    if remainder or ratio < 1:
        raise ValueError(f"{num_layers} layers are not a multiple of {model.config.num_layers}")
    deeper = NanoDecoder(replace(model.config, num_layers=num_layers))
    deeper.initialize(generator)
    deeper.to(model.embed_tokens.weight.dtype)
    deeper.embed_tokens.load_state_dict(model.embed_tokens.state_dict())
    deeper.norm.load_state_dict(model.norm.state_dict())
    for index, layer in enumerate(deeper.layers):
        trained, is_new = divmod(index, ratio)
        if is_new:
            state = layer.state_dict()
            for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
                state[name] = torch.zeros_like(state[name])
        else:
            state = model.layers[trained].state_dict()
        layer.load_state_dict(state)
    return deeper
