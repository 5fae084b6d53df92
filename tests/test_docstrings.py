"""Every public name says what goes in, what comes out, which errors it raises, the shapes, and where it is from."""

import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

DOCS = Path(__file__).parents[1] / "docs"
ROOMS = [
    "spatial_decay",
    "spatial_decay.checkpoint",
    "spatial_decay.decay",
    "spatial_decay.integrations.hub",
    "spatial_decay.integrations.timm",
    "spatial_decay.layers",
    "spatial_decay.layers.kinds",
    "spatial_decay.models",
    "spatial_decay.ops",
    "spatial_decay.swap",
    "spatial_decay.viz",
]
SHAPE = re.compile(r"\((?:\d?[A-Z]\w*|\.\.\.|h),[^()]*\)|shape|broadcast")
SOURCE = re.compile(r"\b(?:Eq\.|SDT|RMT|LocAtViT|DiT|ALiBi|timm)")


class Public(NamedTuple):
    """A function, a method, or a class with its __init__."""

    name: str
    docs: str  # its own and those that it overrides
    parameters: dict[str, inspect.Parameter]
    returns: object
    source: str


def public_names():
    found = {}
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in module.__all__:
            found.setdefault(id(getattr(module, name)), (f"{room}.{name}", getattr(module, name)))
    return [pair for pair in found.values() if inspect.isclass(pair[1]) or inspect.isfunction(pair[1])]


def docs_along(cls, name=None):
    ours = [base for base in cls.__mro__ if base.__module__.startswith("spatial_decay")]
    found = [base if name is None else vars(base).get(name) for base in ours]
    return "\n".join(inspect.cleandoc(one.__doc__) for one in found if one is not None and one.__doc__)


def source_of(function):
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):  # what a dataclass makes
        return ""


def members(name, cls):
    """The class and its own public methods; of those that only pass arguments on, the documented ones are a base's."""
    signature = inspect.signature(cls) if callable(cls) and cls is not dict else None
    start = vars(cls).get("__post_init__", vars(cls).get("__init__"))
    parameters = {} if start is None and "__dataclass_fields__" not in vars(cls) else dict(signature.parameters)
    yield Public(name, docs_along(cls), parameters, None, source_of(start))
    for key, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if key.startswith("_") or key == "extra_repr" or not inspect.isfunction(function):
            continue
        signature = inspect.signature(function)
        returns = None if isinstance(member, property) else signature.return_annotation
        docs = docs_along(cls, key)
        yield Public(f"{name}.{key}", docs, dict(signature.parameters), returns, source_of(function))


def everything():
    for name, public in public_names():
        if inspect.isclass(public):
            if not hasattr(public, "__total__"):  # a TypedDict has no arguments
                yield from members(name, public)
        else:
            signature = inspect.signature(public)
            docs, source = inspect.cleandoc(public.__doc__ or ""), source_of(public)
            yield Public(name, docs, dict(signature.parameters), signature.return_annotation, source)


def section(docs, name):
    return "\n".join(re.findall(rf"^{name}:\n((?:[ \n].*\n?|\n)+)", docs, re.MULTILINE))


def missing(public):
    """What its documentation leaves out."""
    if not public.docs:
        return ["everything"]
    arguments = [p for p in public.parameters if p not in ("self", "cls")]
    # "x (B, L, D) -> (B, N, L)." says of one argument all that the sections would.
    arrow = "->" in public.docs.partition("\n\n")[0] and len(arguments) == 1
    said = section(public.docs, "Args")
    is_returned = public.returns not in (None, inspect.Signature.empty) and not section(public.docs, "Returns")
    of_tensors = [str(p.annotation) for p in public.parameters.values()] + [str(public.returns)]
    return [
        *(name for name in arguments if not arrow and not re.search(rf"^ +{name}\b", said, re.MULTILINE)),
        *["Returns" for _ in [0] if is_returned and not arrow],
        *["Raises" for _ in [0] if re.search(r"^ +raise ", public.source, re.M) and not section(public.docs, "Raises")],
        *["a shape" for _ in [0] if any("Tensor" in one for one in of_tensors) and not SHAPE.search(public.docs)],
    ]


def test_public_names_are_documented():
    found = {public.name: missing(public) for public in everything()}
    assert len(found) > 150
    assert {name: left_out for name, left_out in found.items() if left_out} == {}


@pytest.mark.parametrize("room", ["decay", "layers.kinds", "models"])
def test_mathematics_names_its_source(room):
    for name, public in public_names():
        if name.startswith(f"spatial_decay.{room}."):
            module = importlib.import_module(public.__module__)
            assert SOURCE.search(f"{public.__doc__} {module.__doc__}"), name


def test_public_names_stand_on_a_page_of_the_api():
    documented = set(re.findall(r"^::: (\S+)$", "".join(p.read_text() for p in (DOCS / "api").glob("*.md")), re.M))
    shown = [importlib.import_module(one) for one in documented if inspect.ismodule(pkgutil.resolve_name(one))]
    whole = {id(getattr(module, name)) for module in shown for name in module.__all__}
    single = {id(pkgutil.resolve_name(one)) for one in documented}
    registered = "spatial_decay.integrations.timm."  # timm's functions of the same names as the builders
    left_out = [name for name, public in public_names() if id(public) not in whole | single]
    assert [name for name in left_out if not name.startswith(registered)] == []
