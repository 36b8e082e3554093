from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SourceState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOURCE_STATE_UNSPECIFIED: _ClassVar[SourceState]
    SOURCE_STATE_CONNECTING: _ClassVar[SourceState]
    SOURCE_STATE_SYNCING: _ClassVar[SourceState]
    SOURCE_STATE_LIVE: _ClassVar[SourceState]
    SOURCE_STATE_STALE: _ClassVar[SourceState]
    SOURCE_STATE_GONE: _ClassVar[SourceState]
SOURCE_STATE_UNSPECIFIED: SourceState
SOURCE_STATE_CONNECTING: SourceState
SOURCE_STATE_SYNCING: SourceState
SOURCE_STATE_LIVE: SourceState
SOURCE_STATE_STALE: SourceState
SOURCE_STATE_GONE: SourceState

class Namespace(_message.Message):
    __slots__ = ("model", "page_size", "revision", "kv_dtype", "layout", "lora", "salt")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    model: str
    page_size: int
    revision: str
    kv_dtype: str
    layout: str
    lora: str
    salt: str
    def __init__(self, model: _Optional[str] = ..., page_size: _Optional[int] = ..., revision: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., layout: _Optional[str] = ..., lora: _Optional[str] = ..., salt: _Optional[str] = ...) -> None: ...

class MatchRequest(_message.Message):
    __slots__ = ("namespace", "hashes", "total_tokens")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    hashes: _containers.RepeatedScalarFieldContainer[int]
    total_tokens: int
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., hashes: _Optional[_Iterable[int]] = ..., total_tokens: _Optional[int] = ...) -> None: ...

class MatchResponse(_message.Message):
    __slots__ = ("holders", "revision")
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    holders: _containers.RepeatedCompositeFieldContainer[Holder]
    revision: int
    def __init__(self, holders: _Optional[_Iterable[_Union[Holder, _Mapping]]] = ..., revision: _Optional[int] = ...) -> None: ...

class Holder(_message.Message):
    __slots__ = ("worker_id", "site", "dp_rank", "matched_tokens", "usable_tokens")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    DP_RANK_FIELD_NUMBER: _ClassVar[int]
    MATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    USABLE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    site: str
    dp_rank: int
    matched_tokens: int
    usable_tokens: int
    def __init__(self, worker_id: _Optional[str] = ..., site: _Optional[str] = ..., dp_rank: _Optional[int] = ..., matched_tokens: _Optional[int] = ..., usable_tokens: _Optional[int] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("site", "namespace", "blocks", "entries", "orphans", "revision", "log_bytes", "log_segments", "sources")
    SITE_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    ORPHANS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    LOG_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOG_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    site: str
    namespace: Namespace
    blocks: int
    entries: int
    orphans: int
    revision: int
    log_bytes: int
    log_segments: int
    sources: _containers.RepeatedCompositeFieldContainer[Source]
    def __init__(self, site: _Optional[str] = ..., namespace: _Optional[_Union[Namespace, _Mapping]] = ..., blocks: _Optional[int] = ..., entries: _Optional[int] = ..., orphans: _Optional[int] = ..., revision: _Optional[int] = ..., log_bytes: _Optional[int] = ..., log_segments: _Optional[int] = ..., sources: _Optional[_Iterable[_Union[Source, _Mapping]]] = ...) -> None: ...

class Source(_message.Message):
    __slots__ = ("worker_id", "site", "dp_rank", "state", "next_seq", "entries", "truncated", "counts")
    class CountsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    DP_RANK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQ_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    site: str
    dp_rank: int
    state: SourceState
    next_seq: int
    entries: int
    truncated: bool
    counts: _containers.ScalarMap[str, int]
    def __init__(self, worker_id: _Optional[str] = ..., site: _Optional[str] = ..., dp_rank: _Optional[int] = ..., state: _Optional[_Union[SourceState, str]] = ..., next_seq: _Optional[int] = ..., entries: _Optional[int] = ..., truncated: bool = ..., counts: _Optional[_Mapping[str, int]] = ...) -> None: ...
