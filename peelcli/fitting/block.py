"""One block of a model as the fits see it: a function of its weights, with a look at what enters its matrices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from peelcli.checkpoint.block import same_weights
from peelcli.checkpoint.model import BlockwiseModel
from peelcli.references.interface import LinearMap


class ModelBlock:
    """The block of `layer` whose weights `module` holds; it may be called from several threads at once."""

    def __init__(
        self, model: BlockwiseModel, layer: int, module: nn.Module, sublayer: str | None = None
    ) -> None:
        """sublayer: `attention` or `mlp`, where only its matrices are meant."""
        self.model, self.layer = model, layer
        parameters = dict(module.named_parameters())
        # A call puts weights and hooks into a module as it runs, so that calls at once need one each.
        self._untouched = same_weights(module)
        self._idle: list[nn.Module] = []
        inside = {m for s in model.sublayers(layer) if s.name == sublayer for m in s.modules}
        self.maps = [
            LinearMap(m.name, parameters[m.name].data, m.transposed)
            for m in model.matrices(layer)
            if sublayer is None or m.name.split(".")[0] in inside
        ]

    @contextlib.contextmanager
    def _module(self) -> Iterator[nn.Module]:
        """A module that is this call's alone."""
        try:
            module = self._idle.pop()
        except IndexError:
            module = same_weights(self._untouched)
        try:
            yield module
        finally:
            self._idle.append(module)

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """O (n_seq, seq_len, d_model) from hidden of the same shape, `weights` put in place."""
        with self._module() as module:
            return self.model.run_block(self.layer, module, hidden, ids, weights)

    @property
    def runs_at_once(self) -> bool:
        """Whether several calls at once are faster than one after the other."""
        return self.model.runs_at_once(self.layer)

    @torch.enable_grad()
    def pull(
        self, hidden: Tensor, ids: Tensor, targets: Tensor, weights: Mapping[str, Tensor], name: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """How the block's error ½ ‖block − targets‖² answers to what one matrix gives.

        Returns what enters the matrix (n_tokens, d_in), the error's negative gradient by what it gives (n_tokens,
        d_out), and a random matrix of that shape whose mean square is the diagonal of the error's Gauss-Newton matrix.
        Of a matrix that gives to the residual stream alone these are what the output lacks of the targets, and signs.
        """
        seen: list[Tensor] = []

        def look(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            seen.extend((args[0], out.detach().requires_grad_()))
            return seen[1].clone()  # a family may add to it in place, which torch forbids of a leaf

        with self._module() as module:
            handle = module.get_submodule(name.rpartition(".")[0]).register_forward_hook(look)
            try:
                out = self.model.run_block(self.layer, module, hidden, ids, weights)
            finally:
                handle.remove()
        x, given = seen
        generator = torch.Generator(out.device).manual_seed(0)
        signs = torch.randint(0, 2, out.shape, generator=generator, device=out.device).to(out) * 2 - 1
        (change,) = torch.autograd.grad(out, given, (targets - out).detach(), retain_graph=True)
        (probe,) = torch.autograd.grad(out, given, signs)
        flat = (t.reshape(-1, t.shape[-1]) for t in (x.detach(), change, probe))
        return next(flat), next(flat), next(flat)

    def features(
        self, hidden: Tensor, ids: Tensor, weights: Mapping[str, Tensor], name: str
    ) -> tuple[Tensor, Tensor]:
        """The output as above, and the input (n_seq, seq_len, d_in) of the matrix of that name.

        Of a matrix that does not run once on every token, as a router's experts do not, an empty input.
        """
        seen: list[Tensor] = []
        with self._module() as module:
            owner = module.get_submodule(name.rpartition(".")[0])
            handle = owner.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            try:
                out = self.model.run_block(self.layer, module, hidden, ids, weights)
            finally:
                handle.remove()
        if len(seen) != 1 or seen[0].numel() != ids.numel() * seen[0].shape[-1]:
            return out, out.new_empty(0)
        return out, seen[0].reshape(*out.shape[:2], -1)  # some families lay all tokens in a row for their MLP
