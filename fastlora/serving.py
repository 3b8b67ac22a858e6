"""A transformers causal LM whose batches mix adapters of a bank and the frozen model."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from fastlora.adapters import AdapterStack, Routing, route
from fastlora.bank import AdapterBank
from fastlora.bank_pool import frozen_weight
from fastlora.multi import lora_linear_multi

_MARK = "_fastlora_serving"
_MEDIA = ("pixel_values", "input_features", "input_values", "image", "video", "audio")
_Model = TypeVar("_Model", bound=nn.Module)

AdapterIds = Sequence[str | None] | Tensor | Routing
"""Names, one a sequence; or slots as `AdapterBank.use` gives them; or a routing of all rows."""


def serve(model: _Model, bank: AdapterBank) -> _Model:
    """Let each sequence of a batch use its own adapter of a bank, or none.

    The model changes in place: ``generate(..., adapter_ids=[...])`` and ``model(..., adapter_ids=[...])``
    take the name of an adapter, or ``None`` for the frozen model, for each sequence of the batch. The
    adapters of a call are made resident and held until it returns. Beams and several returned sequences
    use the adapter of their prompt. The rows of a step are routed once, for all layers. Calls without
    ``adapter_ids`` compute what the model did before, and calls from several threads do not meet.

    For loops of your own, ``model(..., adapter_ids=ids)`` also takes the tensor of slots that
    `AdapterBank.use` gives, or a `fastlora.Routing` of the rows, and then does no work of its own on the
    host; the caller holds the adapters. That is what a CUDA graph can capture.

    Args:
        model (nn.Module): a causal LM of transformers, or a module called alike: with ``input_ids`` or
            ``inputs_embeds``. It must be in eval mode when adapters are used.
        bank (AdapterBank): whose layers are linears of the model, on the same device. Its dtype is the
            model's, or float32.

    Returns:
        nn.Module: ``model``.

    Raises:
        TypeError: an argument has the wrong type, or a layer of the bank is no linear of the model.
        ValueError: the model is served already, or shapes, devices or dtypes do not fit.

    Example:
        >>> import torch, fastlora
        >>> class Toy(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.proj = torch.nn.Linear(8, 8)
        ...     def forward(self, input_ids=None, inputs_embeds=None):
        ...         return self.proj(inputs_embeds)
        >>> model = Toy().eval()
        >>> bank = fastlora.AdapterBank(model, slots=4, max_rank=2)
        >>> tensors = {"proj.lora_A": torch.randn(2, 8), "proj.lora_B": torch.randn(8, 2)}
        >>> bank.add("mine", tensors, config={"lora_alpha": 4})
        >>> model = fastlora.serve(model, bank)
        >>> x = torch.randn(1, 3, 8).expand(2, 3, 8)
        >>> y = model(inputs_embeds=x, adapter_ids=["mine", None])
        >>> torch.equal(y[0], y[1]), torch.allclose(y[1], model(inputs_embeds=x)[1], atol=1e-6)
        (False, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(bank, AdapterBank):
        raise TypeError(f"bank must be an AdapterBank, got {type(bank).__name__}")
    if hasattr(model, "_orig_mod"):  # whose attributes are partly those of the module inside
        raise TypeError(
            "model must be served before it is compiled: torch.compile(serve(model, bank))"
        )
    if _MARK in vars(model):
        raise ValueError("model is served already; call fastlora.unserve(model) first")
    serving = _Serving(model, bank)
    for module, forward in serving.layers:
        module.forward = forward
    replaced = {}
    for name, wrap in (("forward", serving.wrap_forward), ("generate", serving.wrap_generate)):
        method = getattr(model, name, None)
        if callable(method):
            replaced[name] = vars(model).get(name)
            setattr(model, name, wrap(method))
    serving.replaced = replaced
    setattr(model, _MARK, serving)
    return model


def unserve(model: _Model) -> _Model:
    """Undo `serve`: the model is as it was, and the bank free for another.

    Args:
        model (nn.Module): what `serve` returned.

    Returns:
        nn.Module: ``model``.

    Raises:
        ValueError: the model is not served.
    """
    serving = vars(model).get(_MARK)
    if not isinstance(serving, _Serving):
        raise ValueError("model is not served")
    for module, _ in serving.layers:
        del module.forward
    for name, before in serving.replaced.items():
        if before is None:
            delattr(model, name)
        else:
            setattr(model, name, before)
    delattr(model, _MARK)
    return model


class _Call:
    """The adapters of one call of ``generate`` or of the model, and the routings made for it."""

    def __init__(self, serving: _Serving, ids: Tensor | Routing) -> None:
        self.serving = serving
        self.ids = ids
        self._routings: dict[tuple[int, int], Routing] = {}

    def step(self, batch: int, length: int, media: bool) -> _Step:
        return _Step(self, batch, length, media)

    def routing(self, batch: int, rows: int) -> Routing:
        """Route ``rows`` rows for each of ``batch`` sequences; the steps of a call share it."""
        routing = self._routings.get((batch, rows))
        if routing is None:
            assert isinstance(self.ids, Tensor)
            # Beams of a prompt are neighbours. expand and reshape: repeat_interleave may sync.
            per_prompt = batch // len(self.ids) * rows
            ids = self.ids[:, None].expand(-1, per_prompt).reshape(-1)
            routing = self._routings[batch, rows] = route(ids, self.serving.bank.slots)
        return routing


class _Step:
    """One forward of the model: how many sequences and tokens it has."""

    def __init__(self, call: _Call, batch: int, length: int, media: bool) -> None:
        if isinstance(call.ids, Routing):
            if len(call.ids) != batch * length:
                raise ValueError(
                    f"adapter_ids routes {len(call.ids)} rows, the input has {batch} x {length}"
                )
        elif batch % len(call.ids):
            raise ValueError(
                f"adapter_ids names adapters for {len(call.ids)} sequences, the input has {batch}"
            )
        self.call, self.batch, self.length, self.media = call, batch, length, media

    def routing(self, x: Tensor, name: str) -> Routing:
        """The routing of the rows of a layer's input."""
        rows = x.shape[:-1].numel()
        if isinstance(self.call.ids, Routing):
            return self.call.ids  # whose length lora_linear_multi checks
        # As many images as prompts need not be one for each: rows of an encoder's are nobody's.
        whole = rows == self.batch * self.length or name == self.call.serving.head
        if x.shape[0] == self.batch and (whole or not self.media):
            return self.call.routing(self.batch, rows // self.batch)
        if x.dim() == 2 and rows == self.batch * self.length:
            return self.call.routing(self.batch, self.length)
        raise ValueError(
            f"{name} got {tuple(x.shape)}, of which the rows of {self.batch} sequences of "
            f"{self.length} tokens cannot be told apart; leave it out of the bank"
        )


_step: contextvars.ContextVar[_Step | None] = contextvars.ContextVar("fastlora_step", default=None)
_call: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("fastlora_call", default=None)


class _LayerForward:
    """The forward of a served linear."""

    __slots__ = ("module", "name", "serving", "stack", "turned")

    def __init__(
        self, serving: _Serving, module: nn.Module, name: str, stack: AdapterStack
    ) -> None:
        self.serving, self.module, self.name, self.stack = serving, module, name, stack
        self.turned = not isinstance(module, nn.Linear)  # Conv1D

    def __call__(self, x: Tensor) -> Tensor:
        step = _step.get()
        if step is None or step.call.serving is not self.serving:
            call = _call.get()
            if call is not None and call.serving is self.serving:
                raise RuntimeError(
                    f"generate ran {self.name} outside the served model's forward, where its adapters "
                    "would be left out; serve the module whose generate runs the layers"
                )
            return type(self.module).forward(self.module, x)  # type: ignore[no-any-return]
        y: Tensor = self._adapted(x, step)
        return y

    # The launches and the tables of a routing are not for a tracer.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _adapted(self, x: Tensor, step: _Step) -> Tensor:
        parameters = self.module._parameters  # asked for anew: .to() may change what they hold
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
        w = weight.t() if self.turned else weight
        return lora_linear_multi(x, w, self.stack, step.routing(x, self.name), bias=bias)

    def __reduce__(self) -> NoReturn:
        # A copy would compute with this module's weights and share its bank.
        raise TypeError("a served model cannot be copied or pickled; fastlora.unserve it first")


class _Serving:
    """What `serve` did to a model."""

    def __init__(self, model: nn.Module, bank: AdapterBank) -> None:
        self.model = model
        self.bank = bank
        self.replaced: dict[str, Any] = {}
        output = getattr(model, "get_output_embeddings", lambda: None)()
        self.head = next((n for n, m in model.named_modules() if m is output), None)
        self.layers: list[tuple[nn.Module, _LayerForward]] = []
        for name in bank.layers:
            module = _layer_of(model, name, bank)
            if any(module is other for other, _ in self.layers):
                raise ValueError(f"{name} is the same module as another layer of the bank")
            forward = _LayerForward(self, module, name, bank.layer(name))
            self.layers.append((module, forward))

    def wrap_generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(generate)
        def served_generate(
            *args: Any, adapter_ids: AdapterIds | None = None, **kwargs: Any
        ) -> Any:
            names = ("inputs", "input_ids", "inputs_embeds")
            inputs = next((kwargs[n] for n in names if kwargs.get(n) is not None), None)
            if adapter_ids is None:
                with _set(_call, None):  # of an outer call's adapters it knows nothing
                    return generate(*args, **kwargs)
            if isinstance(adapter_ids, Routing):
                raise TypeError("adapter_ids of generate must be names or slots, got a Routing")
            inputs = args[0] if inputs is None and args else inputs
            _check_ids(adapter_ids)
            count = 1 if inputs is None else len(inputs)
            if len(adapter_ids) != count:
                raise ValueError(
                    f"adapter_ids must have one entry for each of the {count} sequences, "
                    f"got {len(adapter_ids)}"
                )
            with self._held(adapter_ids) as call, _set(_call, call):
                return generate(*args, **kwargs)

        return served_generate

    def wrap_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def served_forward(*args: Any, adapter_ids: AdapterIds | None = None, **kwargs: Any) -> Any:
            call = _call.get()
            if adapter_ids is None and (call is None or call.serving is not self):
                with _set(_step, None):
                    return forward(*args, **kwargs)
            inputs = kwargs.get("input_ids")
            inputs = args[0] if inputs is None and args else inputs
            inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
            if not isinstance(inputs, Tensor) or inputs.dim() < 2:
                raise ValueError(
                    "adapter_ids needs input_ids or inputs_embeds (batch, length, ...)"
                )
            batch, length = inputs.shape[:2]
            if batch == 0:
                return forward(*args, **kwargs)
            with contextlib.ExitStack() as stack:
                if adapter_ids is not None:
                    _check_ids(adapter_ids)
                    if isinstance(adapter_ids, Routing):
                        count = len(adapter_ids) // max(length, 1)
                    else:
                        count = len(adapter_ids)
                    if count != batch:
                        raise ValueError(
                            f"adapter_ids must have one entry for each of the {batch} sequences, "
                            f"got {count}"
                        )
                    call = stack.enter_context(self._held(adapter_ids))
                media = any(
                    value is not None and name.startswith(_MEDIA) for name, value in kwargs.items()
                )
                stack.enter_context(_set(_step, call and call.step(batch, length, media)))
                return forward(*args, **kwargs)

        return served_forward

    @contextlib.contextmanager
    def _held(self, adapter_ids: AdapterIds) -> Iterator[_Call | None]:
        """The call of these ids; None where all sequences use the frozen model."""
        for module, _ in self.layers:
            if module.training:
                raise ValueError(
                    "adapter_ids needs the model in eval mode; call model.eval() first"
                )
        if isinstance(adapter_ids, (Tensor, Routing)):
            yield _Call(self, adapter_ids)
            return
        if all(name is None for name in adapter_ids):
            yield None
            return
        with self.bank.use(adapter_ids) as ids:
            yield _Call(self, ids)


def _check_ids(adapter_ids: object) -> None:
    """Raise for what is not one name or slot a sequence, nor a `Routing`."""
    if isinstance(adapter_ids, str):
        raise TypeError("adapter_ids must be a list of names, got a string")
    if isinstance(adapter_ids, Tensor) and adapter_ids.dim() != 1:
        raise ValueError(
            "adapter_ids as a tensor must be one slot a sequence, [batch], "
            f"got {tuple(adapter_ids.shape)}; for one a token pass fastlora.route of all rows"
        )


def _layer_of(model: nn.Module, name: str, bank: AdapterBank) -> nn.Module:
    """The linear of a bank's layer, checked against the bank."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise TypeError(f"the model has no module {name}, a layer of the bank") from None
    weight = frozen_weight(model, name)
    if isinstance(weight, str):
        raise TypeError(f"{name} cannot be served: {weight}")
    stack = bank.layer(name)
    expected = (stack.lora_B.shape[1], stack.lora_A.shape[2])
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"{name} must be (out_features, in_features)={expected}, as the bank's layer, "
            f"got {tuple(weight.shape)}"
        )
    if weight.device != bank.device:
        raise ValueError(f"{name} must be on {bank.device}, as the bank, got {weight.device}")
    if bank.dtype not in (weight.dtype, torch.float32):
        raise ValueError(
            f"the bank must be {weight.dtype}, as {name}, or float32, got {bank.dtype}"
        )
    return module


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar[Any], value: object) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
