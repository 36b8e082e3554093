// The prefix index: the same answers as cache_service/core/index.py, which says what they mean.
//
// Where it differs inside. Equal holder sets are kept once (held.hpp), so what drops a holder changes those, and
// every answer is right at once. Blocks that nobody holds any more then stay where they are, unseen, until the
// changes that follow have swept over all nodes, `sweep_blocks` each. Holders are slots here; names and their order
// are the caller's.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "nodes.hpp"
#include "uses.hpp"

namespace prfaas {

struct Applied {
  u64 stored = 0, removed = 0, unchanged = 0, conflicts = 0;
};

struct Counts {
  u64 blocks = 0, entries = 0, orphans = 0, group_entries = 0;
};

// A run of blocks, each the parent of the next, that the same holders have in one tier.
struct Run {
  std::vector<i64> hashes;
  u32 parent;  // node of the first block's parent, kRoot for none
  u32 tier;
  std::vector<u32> slots;
};

// Blocks at which the same holders have an entry of a group.
struct Grouped {
  std::vector<i64> hashes;
  u32 row;
  std::vector<u32> slots;
};

// The blocks of a query, read one by one: a search looks at few of them.
class Query {
 public:
  virtual ~Query() = default;
  virtual std::size_t size() const = 0;
  // False when the value is no block hash: nobody holds that.
  virtual bool at(std::size_t position, i64& hash) const = 0;
};

// Holders whose prefix of a query is equally deep.
struct Depth {
  std::size_t matched;
  Bits holders;
};

struct Answer {
  static constexpr std::size_t kWhole = ~std::size_t{0};

  std::vector<Depth> depths;  // deepest first, none twice
  // By slot: the boundary, or kWhole for a holder whose model needs nothing beside; empty when all are such.
  std::vector<std::size_t> usable;
};

class Index {
 public:
  Index(u64 budget_bytes, u32 sweep_blocks) : budget_bytes_(budget_bytes), sweep_blocks_(sweep_blocks) {}
  Index(const Index&) = default;

  // Makes slots 0 .. slots-1 usable.
  void reserve_slots(u32 slots);
  void release_slot(u32 slot);
  void declare(u32 slot, bool state, u32 window_blocks);
  void quarantine(u32 slot, bool on);

  Applied store(u32 slot, u32 tier, const i64* hashes, std::size_t count, const i64* parent);
  Applied remove(u32 slot, u32 tier, const i64* hashes, std::size_t count);
  Applied store_group(u32 slot, u32 row, const i64* hashes, std::size_t count);
  Applied remove_group(u32 slot, u32 row, const i64* hashes, std::size_t count);
  // Every change that the four above make ends with this.
  void finish(const Applied& applied);
  // O(distinct holder sets). Returns how many entries went.
  u64 clear(u32 slot);
  // Forgets the block that is next in line, for all holders; false when there is none. Only with a budget.
  bool evict_next(i64& hash);

  Answer match(const Query& query, std::size_t limit);

  u64 revision() const { return revision_; }
  u64 evicted() const { return evicted_; }
  u64 entries(u32 slot) const { return holders_[slot].entries; }
  Counts counts() const;
  u64 bytes_estimate() const;
  u64 runs(std::vector<Run>* into, std::size_t longest) const;
  std::vector<Grouped> grouped(std::size_t longest) const;
  i64 hash_of(u32 node) const { return nodes_[node].hash; }
  // Empty when every invariant holds, else what does not. O(entries).
  std::string check() const;

 private:
  struct Holder {
    u64 orphans = 0, entries = 0, group_entries = 0;
  };
  struct Needs {
    bool state;
    u32 window_blocks;
    Bits members;
  };
  bool known(const Node& node) const { return sets_.has_kind(node.held, kBlock); }
  bool holds(const Node& node, u32 slot) const { return sets_.holds_block(node.held, slot); }
  void move(Node& node, u32 held) {
    sets_.keep(held);
    sets_.leave(node.held);
    node.held = held;
  }
  void gain(u32 slot, u32 index, u32 parent);
  void lose(u32 slot, u32 index);
  void forget(u32 index);
  void cut(u32 index);
  bool nothing_held() const;
  void reset();
  void sweep(u32 most);
  void free_if_unused(u32 index);
  void settle(u32 slot);

  // A block that was found, to guess others from.
  struct Near {
    u32 index = kNone;
    std::size_t position = 0;
  };
  const u64* row_at(const Query& query, std::size_t position, Near& near) const;
  Bits holders_of(const Query& query, std::size_t position, Kind kind) const;
  void walk(const Query& query, Bits alive, std::vector<Depth>& depths) const;
  void bisect(const Query& query, const Bits& alive, std::vector<Depth>& depths) const;
  void usable(const Query& query, std::size_t limit, const Needs& needs, Answer& answer) const;

  bool is_leaf(u32 index) const {
    return nodes_.live(index) && nodes_[index].child == kNone && known(nodes_[index]);
  }
  bool leaf_at_last(u32 index);
  void inherit(u32 index, u32 parent);
  void settle_heir();
  void place_leaves();
  void evict_to_budget();
  u32 next_to_evict();
  void evict(u32 index);

  std::string check_nodes() const;
  std::string check_holders() const;
  std::string check_budget() const;

  Nodes nodes_;
  HeldSets sets_;
  std::vector<Holder> holders_;
  Bits orphaned_{1};
  Bits quarantined_{1};
  std::vector<Needs> needs_;
  u64 blocks_ = 0;
  u64 revision_ = 0;

  u64 budget_bytes_;
  u64 evicted_ = 0;
  Uses uses_;  // empty without a budget
  u32 heir_ = kNone, went_ = kNone;  // a leaf that waits for a place, and the node above where one may be
  bool unplaced_ = false;  // whether a clear may have made leaves that have no place there
  u32 evict_at_ = 0;

  // After a clear: from `swept_` to the end, then up to `stop_`, nodes may be garbage.
  u32 sweep_blocks_;
  u32 swept_ = 0, stop_ = 0;
  bool sweeping_ = false, wrapped_ = false;
};

}  // namespace prfaas
