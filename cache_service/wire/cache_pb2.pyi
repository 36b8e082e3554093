from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_GPU: _ClassVar[Tier]
    TIER_HOST: _ClassVar[Tier]
    TIER_DISK: _ClassVar[Tier]
    TIER_EXTERNAL: _ClassVar[Tier]

class Group(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GROUP_UNSPECIFIED: _ClassVar[Group]
    GROUP_STATE: _ClassVar[Group]
    GROUP_SWA: _ClassVar[Group]

class ChangeKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHANGE_KIND_UNSPECIFIED: _ClassVar[ChangeKind]
    CHANGE_KIND_STORED: _ClassVar[ChangeKind]
    CHANGE_KIND_REMOVED: _ClassVar[ChangeKind]
    CHANGE_KIND_CLEARED: _ClassVar[ChangeKind]

class SourceState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOURCE_STATE_UNSPECIFIED: _ClassVar[SourceState]
    SOURCE_STATE_CONNECTING: _ClassVar[SourceState]
    SOURCE_STATE_SYNCING: _ClassVar[SourceState]
    SOURCE_STATE_LIVE: _ClassVar[SourceState]
    SOURCE_STATE_STALE: _ClassVar[SourceState]
    SOURCE_STATE_GONE: _ClassVar[SourceState]
TIER_GPU: Tier
TIER_HOST: Tier
TIER_DISK: Tier
TIER_EXTERNAL: Tier
GROUP_UNSPECIFIED: Group
GROUP_STATE: Group
GROUP_SWA: Group
CHANGE_KIND_UNSPECIFIED: ChangeKind
CHANGE_KIND_STORED: ChangeKind
CHANGE_KIND_REMOVED: ChangeKind
CHANGE_KIND_CLEARED: ChangeKind
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
    __slots__ = ("holders", "revision", "starting")
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STARTING_FIELD_NUMBER: _ClassVar[int]
    holders: _containers.RepeatedCompositeFieldContainer[Holder]
    revision: int
    starting: bool
    def __init__(self, holders: _Optional[_Iterable[_Union[Holder, _Mapping]]] = ..., revision: _Optional[int] = ..., starting: bool = ...) -> None: ...

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

class MatchBatchRequest(_message.Message):
    __slots__ = ("queries",)
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    queries: _containers.RepeatedCompositeFieldContainer[MatchRequest]
    def __init__(self, queries: _Optional[_Iterable[_Union[MatchRequest, _Mapping]]] = ...) -> None: ...

class MatchBatchResponse(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[MatchResponse]
    def __init__(self, answers: _Optional[_Iterable[_Union[MatchResponse, _Mapping]]] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("holders", "query_blocks", "limit_tokens", "revision")
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    QUERY_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    holders: _containers.RepeatedCompositeFieldContainer[HolderReport]
    query_blocks: int
    limit_tokens: int
    revision: int
    def __init__(self, holders: _Optional[_Iterable[_Union[HolderReport, _Mapping]]] = ..., query_blocks: _Optional[int] = ..., limit_tokens: _Optional[int] = ..., revision: _Optional[int] = ...) -> None: ...

class HolderReport(_message.Message):
    __slots__ = ("holder", "source_state", "age_s", "offered", "groups", "missing")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    SOURCE_STATE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    OFFERED_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    holder: Holder
    source_state: SourceState
    age_s: float
    offered: bool
    groups: _containers.RepeatedCompositeFieldContainer[GroupReport]
    missing: str
    def __init__(self, holder: _Optional[_Union[Holder, _Mapping]] = ..., source_state: _Optional[_Union[SourceState, str]] = ..., age_s: _Optional[float] = ..., offered: bool = ..., groups: _Optional[_Iterable[_Union[GroupReport, _Mapping]]] = ..., missing: _Optional[str] = ...) -> None: ...

class GroupReport(_message.Message):
    __slots__ = ("group", "present_blocks", "deepest_tokens", "tier_blocks")
    class TierBlocksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    GROUP_FIELD_NUMBER: _ClassVar[int]
    PRESENT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DEEPEST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIER_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    group: Group
    present_blocks: int
    deepest_tokens: int
    tier_blocks: _containers.ScalarMap[str, int]
    def __init__(self, group: _Optional[_Union[Group, str]] = ..., present_blocks: _Optional[int] = ..., deepest_tokens: _Optional[int] = ..., tier_blocks: _Optional[_Mapping[str, int]] = ...) -> None: ...

class HotPrefixesRequest(_message.Message):
    __slots__ = ("namespace", "top")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    top: int
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., top: _Optional[int] = ...) -> None: ...

class HotPrefixesResponse(_message.Message):
    __slots__ = ("prefixes", "observed")
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    OBSERVED_FIELD_NUMBER: _ClassVar[int]
    prefixes: _containers.RepeatedCompositeFieldContainer[HotPrefix]
    observed: int
    def __init__(self, prefixes: _Optional[_Iterable[_Union[HotPrefix, _Mapping]]] = ..., observed: _Optional[int] = ...) -> None: ...

class HotPrefix(_message.Message):
    __slots__ = ("hash", "tokens", "uses", "uses_error", "holders")
    HASH_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    USES_ERROR_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    hash: int
    tokens: int
    uses: int
    uses_error: int
    holders: _containers.RepeatedCompositeFieldContainer[Holder]
    def __init__(self, hash: _Optional[int] = ..., tokens: _Optional[int] = ..., uses: _Optional[int] = ..., uses_error: _Optional[int] = ..., holders: _Optional[_Iterable[_Union[Holder, _Mapping]]] = ...) -> None: ...

class DumpRequest(_message.Message):
    __slots__ = ("namespace", "page_blocks")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PAGE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    page_blocks: int
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., page_blocks: _Optional[int] = ...) -> None: ...

class DumpPage(_message.Message):
    __slots__ = ("life", "revision", "changes", "last", "entries")
    LIFE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    life: int
    revision: int
    changes: _containers.RepeatedCompositeFieldContainer[Change]
    last: bool
    entries: int
    def __init__(self, life: _Optional[int] = ..., revision: _Optional[int] = ..., changes: _Optional[_Iterable[_Union[Change, _Mapping]]] = ..., last: bool = ..., entries: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("namespace", "life", "revision")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    life: int
    revision: int
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., life: _Optional[int] = ..., revision: _Optional[int] = ...) -> None: ...

class WatchEvent(_message.Message):
    __slots__ = ("life", "revision", "changes")
    LIFE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    life: int
    revision: int
    changes: _containers.RepeatedCompositeFieldContainer[Change]
    def __init__(self, life: _Optional[int] = ..., revision: _Optional[int] = ..., changes: _Optional[_Iterable[_Union[Change, _Mapping]]] = ...) -> None: ...

class Change(_message.Message):
    __slots__ = ("worker_id", "dp_rank", "kind", "group", "tier", "parent", "hashes")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    DP_RANK_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    dp_rank: int
    kind: ChangeKind
    group: Group
    tier: Tier
    parent: int
    hashes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, worker_id: _Optional[str] = ..., dp_rank: _Optional[int] = ..., kind: _Optional[_Union[ChangeKind, str]] = ..., group: _Optional[_Union[Group, str]] = ..., tier: _Optional[_Union[Tier, str]] = ..., parent: _Optional[int] = ..., hashes: _Optional[_Iterable[int]] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("namespace",)
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ...) -> None: ...

class CheckResponse(_message.Message):
    __slots__ = ("violations", "revision", "blocks", "entries", "seconds")
    VIOLATIONS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    violations: _containers.RepeatedScalarFieldContainer[str]
    revision: int
    blocks: int
    entries: int
    seconds: float
    def __init__(self, violations: _Optional[_Iterable[str]] = ..., revision: _Optional[int] = ..., blocks: _Optional[int] = ..., entries: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("site", "namespace", "blocks", "entries", "orphans", "revision", "log_bytes", "log_segments", "sources", "life", "group_entries", "evicted_blocks", "bytes_estimate", "watchers", "direct_port", "starting", "behind")
    SITE_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    ORPHANS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    LOG_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOG_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    GROUP_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    EVICTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    WATCHERS_FIELD_NUMBER: _ClassVar[int]
    DIRECT_PORT_FIELD_NUMBER: _ClassVar[int]
    STARTING_FIELD_NUMBER: _ClassVar[int]
    BEHIND_FIELD_NUMBER: _ClassVar[int]
    site: str
    namespace: Namespace
    blocks: int
    entries: int
    orphans: int
    revision: int
    log_bytes: int
    log_segments: int
    sources: _containers.RepeatedCompositeFieldContainer[Source]
    life: int
    group_entries: int
    evicted_blocks: int
    bytes_estimate: int
    watchers: int
    direct_port: int
    starting: bool
    behind: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, site: _Optional[str] = ..., namespace: _Optional[_Union[Namespace, _Mapping]] = ..., blocks: _Optional[int] = ..., entries: _Optional[int] = ..., orphans: _Optional[int] = ..., revision: _Optional[int] = ..., log_bytes: _Optional[int] = ..., log_segments: _Optional[int] = ..., sources: _Optional[_Iterable[_Union[Source, _Mapping]]] = ..., life: _Optional[int] = ..., group_entries: _Optional[int] = ..., evicted_blocks: _Optional[int] = ..., bytes_estimate: _Optional[int] = ..., watchers: _Optional[int] = ..., direct_port: _Optional[int] = ..., starting: bool = ..., behind: _Optional[_Iterable[str]] = ...) -> None: ...

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
