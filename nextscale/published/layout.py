"""A method's official layout: what its classes, files and key names are; and state dicts there and back by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from nextscale.modules import as_module
from nextscale.published.arguments import Constructor, S, differences, nested, settings_of
from nextscale.published.keys import Rename, fill, ordered, renamed
from nextscale.settings import Settings
from nextscale.system import System, find_recipe

State = dict[str, Tensor]
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """What conversion must know of a method's official code. Of pairs, the tokenizer's comes first, then the generator's.

    Args:
        hub: the repository of the published files.
        constructors: the arguments of its classes.
        keys: (a system, arguments of the generator's class) to the functions that rename our keys to the official ones.
        derived: (a system, arguments of the generator's class) to the entries that follow from these.
        files: names of files for a system that was not published.
        unread: entries that say nothing about the weights, and how many of their first dimensions may have any size. They
            may hold anything; a conversion keeps them.
        free: settings that the official classes are not told: those of sampling and training, and names of classes.
        usual: other forms in which a generator's entries are known to come, to the usual one.
        within: the key of a file's content under which the weights are; "": the content is the state dict.
        trained: the same of a training checkpoint, under its key `trainer`; "": not known, so refused.
        given: for such a system, the arguments of the generator's class that no setting says.
        sort: whether official entries have the order of `keys.ORDER`.
        complete: official files have every entry, those that follow from the settings included.
    """

    hub: str
    constructors: tuple[Constructor, Constructor]
    keys: Callable[[System, Arguments], tuple[Rename, Rename]]
    derived: Callable[[System, Arguments], tuple[State, State]]
    files: Callable[[Any], tuple[str, str]]
    unread: Mapping[str, int] = field(default_factory=dict)
    free: frozenset[str] = frozenset({"classes", "sampling"})
    usual: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda state: state
    within: tuple[str, str] = ("", "")
    trained: tuple[str, str] = ("", "")
    given: Callable[[Any], Arguments] = lambda config: {}
    sort: tuple[bool, bool] = (False, False)
    complete: bool = False

    def settings(self, kind: type[S], vae_args: Arguments, model_args: Arguments) -> S:
        """Our settings, a recipe's `Config`, for the official constructors' arguments."""
        return settings_of(kind, tuple(zip(self.constructors, (vae_args, model_args), strict=True)))

    def arguments(self, config: S, given: Arguments | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The official constructors' arguments for our settings. `given`: those of the generator's that no setting says.

        Raises ValueError for settings that the official classes cannot express.
        """
        of_tokenizer, of_model = self.constructors
        vae_args, model_args = of_tokenizer.arguments(config, {}), of_model.arguments(config, given or {})
        again = self.settings(type(config), vae_args, model_args)
        if wrong := list(differences(config, again, self.free)):
            raise ValueError(
                f"the {of_tokenizer.name} and {of_model.name.rpartition(' ')[2]} cannot express {', '.join(wrong)}; only "
                "systems of their own shapes convert"
            )
        return vae_args, model_args

    def model_arguments(self, config: S, given: Arguments | None) -> Arguments:
        """All arguments of the generator's class, defaults included."""
        return self.constructors[1].complete(self.arguments(config, given)[1])


def to_states(
    layout: Layout, system: System, kept: Mapping[str, Tensor] | None = None, given: Arguments | None = None
) -> tuple[State, State]:
    """Official state dicts that hold a system: names, shapes and order, in float32; weights that are so are shared.

    Args:
        kept: contents of entries of `layout.unread`; default: what a new official model has.
        given: arguments of the generator's class that no setting says.

    Raises ValueError for a system that the official classes cannot express, or that methods changed.
    """
    if system.changes:
        methods = " and ".join(change.recipe for change in system.changes)
        raise ValueError(f"the official code does not know {methods}; take the system before it, `system.base`")
    model_args = layout.model_arguments(system.config, given)
    keys, derived = layout.keys(system, model_args), layout.derived(system, model_args)
    states = []
    for module, rename, extra, sort in zip(
        (system.tokenizer, system.need_model()), keys, derived, layout.sort, strict=True
    ):
        state = {name: _as_float32(tensor) for name, tensor in (renamed(as_module(module), rename) | extra).items()}
        state |= {name: tensor for name, tensor in (kept or {}).items() if name in state and name in layout.unread}
        states.append(ordered(state) if sort else state)
    return states[0], states[1]


def from_states(
    layout: Layout,
    build: Callable[..., System],
    config: Any,
    states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    *,
    given: Arguments | None = None,
    sources: tuple[str, str] = ("the tokenizer's state dict", "the transformer's state dict"),
    complete: bool = False,
    **options: Any,
) -> System:
    """The system of `config` with the weights of official state dicts, which it shares where it can.

    Args:
        build: the recipe's function; `options` are arguments of it.
        given: as for `to_states`.
        sources: where the states come from, for messages.
        complete: entries that follow from the settings may not be left out.

    Raises ValueError for names, shapes or values that do not fit: all of them are listed.
    """
    with torch.device("meta"):
        system = build(config, **options)
    expected = to_states(layout, system, given=given)
    keys = layout.keys(system, layout.model_arguments(config, given))
    vae_state, model_state = states
    fill(as_module(system.tokenizer), vae_state, expected[0], keys[0], sources[0], complete, layout.unread)
    fill(as_module(system.model), layout.usual(model_state), expected[1], keys[1], sources[1], complete, layout.unread)
    return system.eval()


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def with_own_weights(system: System) -> System:
    """The same system with copies of its weights, so that training it does not train the state dicts that they came from."""
    for parameter in system.parameters():
        parameter.data = parameter.data.clone()
    return system


class Published(Settings):
    """A published checkpoint. Each method's kind of it has the scores that its authors gave, and these facts."""

    recipe: ClassVar[str]

    @property
    def files(self) -> tuple[str, str]:
        """Names of the published files: tokenizer, generator. One without an ending is a folder of shards."""
        raise NotImplementedError

    @property
    def constructor(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments of the official classes, where they are not the defaults."""
        raise NotImplementedError

    @property
    def beyond(self) -> dict[str, Any]:
        """Settings that the constructors are not told, by their paths."""
        return {}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of its classes; none where it is told something else."""
        return ()

    @property
    def card(self) -> str:
        """What it is, where its scores are from and its licence, for the README of a converted folder."""
        raise NotImplementedError

    def config(self, **changes: object) -> Any:
        """Our settings, a `Config` of the recipe."""
        recipe = find_recipe(self.recipe)
        config = recipe.official_config(*self.constructor)
        return recipe.Config.model_validate(nested(self.beyond, config.model_dump()) | changes)

    def named_config(self) -> Any:
        """The same with the names of its classes, which no weights depend on."""
        return self.config(classes=self.classes) if self.classes else self.config()
