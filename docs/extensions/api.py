"""Extensions of Griffe, which reads the package for the API reference."""

import re
from typing import Any

from griffe import Alias, Extension, Module, Object

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod|obj):`(~?)([^`]+)`")


class Roles(Extension):
    """reStructuredText's roles as code, with a link where the reference has the object."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda found: _link(obj, bool(found[1]), found[2]), obj.docstring.value)


class ExportedFunctions(Extension):
    """What ``package/name.py`` defines as ``name`` and the package exports is the function, not the file."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        self._visit(pkg)

    def _visit(self, module: Module) -> None:
        for name, child in list(module.modules.items()):
            if child.is_alias:
                continue
            self._visit(child)
            if name in (module.exports or ()) and name in child.members:
                module.members[name] = Alias(name, child.members[name], parent=module)


def _link(obj: Object, short: bool, name: str) -> str:
    shown = name.rpartition(".")[2] if short else name
    # A name without a package is one of the same class or module.
    around = obj if obj.is_module else obj.parent
    path = name if name.startswith("effnet_kernels.") or around is None else f"{around.path}.{name}"
    return f'<autoref optional identifier="{path}"><code>{shown}</code></autoref>'
