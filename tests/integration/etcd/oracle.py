"""The PyPI package `etcd3` as an independent opinion on what is in etcd.

Its generated code does not load on a current protobuf. So its message classes are made anew from the schema
that the package itself carries (the serialized descriptors in its `*_pb2.py`), in a descriptor pool of their
own, and put where the package looks for them. Nothing of our schema takes part.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from google.protobuf import descriptor_pool, message_factory


def _serialized(path: Path) -> bytes:
    """Return the file descriptor that old generated code holds as a literal."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "serialized_pb" and isinstance(node.value, ast.Call):
            literal = node.value.args[0]
            assert isinstance(literal, ast.Constant)
            return str(literal.value).encode("latin1")
    raise AssertionError(f"{path} holds no descriptor")


def load() -> Any:
    """Import etcd3 with working message classes."""
    if "etcd3" in sys.modules:
        return sys.modules["etcd3"]
    spec = importlib.util.find_spec("etcd3")
    assert spec is not None, "the oracle is in the dev extra: etcd3==0.12.0"
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "etcdrpc"
    pool = descriptor_pool.DescriptorPool()
    messages = ModuleType("etcd3.etcdrpc.rpc_pb2")
    for name in ("kv", "auth", "rpc"):
        added = pool.AddSerializedFile(_serialized(folder / f"{name}_pb2.py"))
        file = pool.FindFileByName(added.name if added is not None else f"{name}.proto")
        for descriptor in file.message_types_by_name.values():
            setattr(messages, descriptor.name, message_factory.GetMessageClass(descriptor))
        for enum in file.enum_types_by_name.values():
            for value in enum.values:
                setattr(messages, value.name, value.number)
    package = ModuleType("etcd3.etcdrpc")
    package.__path__ = [str(folder)]
    package.__dict__.update({k: v for k, v in vars(messages).items() if not k.startswith("__")})
    package.rpc_pb2 = messages  # type: ignore[attr-defined]
    sys.modules["etcd3.etcdrpc"] = package
    sys.modules["etcd3.etcdrpc.rpc_pb2"] = messages
    # Its service stubs name `etcd3.etcdrpc.rpc_pb2`, whose import would import `etcd3` first: in this order.
    parent = ModuleType("etcd3")
    parent.__path__ = [str(folder.parent)]
    parent.etcdrpc = package  # type: ignore[attr-defined]
    sys.modules["etcd3"] = parent
    stubs = importlib.import_module("etcd3.etcdrpc.rpc_pb2_grpc")
    package.__dict__.update({k: v for k, v in vars(stubs).items() if k.endswith("Stub")})
    del sys.modules["etcd3"]
    return importlib.import_module("etcd3")
