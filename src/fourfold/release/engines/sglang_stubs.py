"""An import hook: packages that SGLang imports and that only a CUDA machine has become inert stand-ins.

Good for building models and loading weights, for nothing else: a stand-in that is called as a kernel computes nothing.
What is installed always wins.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any

KERNELS = """
    aiter cuda cuda_bindings cuda_python cute_dsl cutlass deep_ep deep_gemm flash_attn flash_attn_interface flash_mla
    flash_mla_sm100 flashinfer granian humming kernels mlx mooncake nixl nvfp4 nvidia nvshmem petit_kernel quack
    sgl_deep_ep sgl_flash_mla sgl_kernel sgl_kernel_npu sglang_kernel tilelang torch_memory_saver torch_npu torchao
    triton_kernels
"""
EXTRAS = """
    IPython addict av blobfile build checkpoint_engine datasets dateutil decord decord2 deepseek_recipe diffusers distro
    easydict fastokens mlc modelscope openai_harmony outlines py_spy pynvml remote_pdb scipy smg_grpc_servicer soundfile
    timm tml_renderers torchaudio torchcodec xxhash zstandard
"""
STANDINS = frozenset(f"{KERNELS} {EXTRAS}".split())


class Inert:
    """An object that can be called, indexed, joined to types with | and inherited from, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        only_function = len(arguments) == 1 and callable(arguments[0]) and not options
        return arguments[0] if only_function else Inert()  # used as a plain decorator it hands the function back

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Inert()

    def __getitem__(self, _: Any) -> Any:
        return Inert()

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__

    def __mro_entries__(self, _: Any) -> tuple[type, ...]:
        return (object,)


class InertType(type):
    """Metaclass of classes that stand in for classes: they take any attribute and any parameter of a generic."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Inert()

    def __getitem__(cls, _: Any) -> Any:
        return cls


class InertModule(types.ModuleType):
    """Has every attribute: a class if its name begins with a capital."""

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return "9.9.9"
        if name.startswith("__"):
            raise AttributeError(name)
        found = InertType(name, (), {"__init__": Inert.__init__}) if name[0].isupper() else Inert()
        setattr(self, name, found)
        return found


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        top, _, _ = name.partition(".")
        inside = name.rpartition(".")[0]
        if top not in STANDINS or (inside and not isinstance(sys.modules.get(inside), InertModule)):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = InertModule(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    sys.meta_path.append(Finder())
