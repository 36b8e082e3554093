// What changes the index.
#include "index.hpp"

#include <algorithm>

namespace prfaas {

void Index::reserve_slots(u32 slots) {
  holders_.resize(std::max<std::size_t>(holders_.size(), slots));
  const u32 words = static_cast<u32>((holders_.size() + 63) / 64);
  if (words <= sets_.words()) return;
  sets_.widen(words);
  orphaned_.widen(words);
  quarantined_.widen(words);
  for (Needs& needs : needs_) needs.members.widen(words);
}

void Index::release_slot(u32 slot) {
  quarantined_.reset(slot);
  for (Needs& needs : needs_) needs.members.reset(slot);
  needs_.erase(std::remove_if(needs_.begin(), needs_.end(), [](const Needs& n) { return !n.members.any(); }),
               needs_.end());
}

void Index::declare(u32 slot, bool state, u32 window_blocks) {
  const bool quarantined = quarantined_.has(slot);
  release_slot(slot);
  if (quarantined) quarantined_.set(slot);
  ++revision_;
  if (!state && !window_blocks) return;
  for (Needs& needs : needs_)
    if (needs.state == state && needs.window_blocks == window_blocks) return needs.members.set(slot);
  needs_.push_back(Needs{state, window_blocks, Bits(sets_.words())});
  needs_.back().members.set(slot);
}

void Index::quarantine(u32 slot, bool on) {
  on ? quarantined_.set(slot) : quarantined_.reset(slot);
  ++revision_;
}

Applied Index::store(u32 slot, u32 tier, const i64* hashes, std::size_t count, const i64* parent_hash) {
  const u32 row = row_of(kBlock, tier);
  Applied applied;
  Transition added(sets_, row, slot, true);
  u32 parent = parent_hash ? nodes_.find(*parent_hash) : kRoot;
  Stride stride;
  for (std::size_t i = 0; i < count; ++i) {
    const u32 index = nodes_.find_or_make(hashes[i], stride.guess());
    stride.found(index);
    Node& node = nodes_[index];
    if (known(node) && node.parent != parent) {
      // The rest of the run hangs below a refused block: refuse it too.
      applied.conflicts = count - i;
      break;
    }
    if (sets_.holds(node.held, row, slot)) {
      ++applied.unchanged;
    } else {
      if (parent == kNone) parent = nodes_.find_or_make(*parent_hash);
      gain(slot, index, parent);
      move(node, added.of(node.held));
      ++applied.stored;
    }
    parent = index;
  }
  holders_[slot].entries += applied.stored;
  settle(slot);
  if (budget_bytes_ && parent < kRoot && known(nodes_[parent])) uses_.touch(parent);
  return applied;
}

Applied Index::remove(u32 slot, u32 tier, const i64* hashes, std::size_t count) {
  const u32 row = row_of(kBlock, tier);
  Applied applied;
  Transition taken(sets_, row, slot, false);
  Stride stride;
  for (std::size_t i = 0; i < count; ++i) {
    const u32 index = nodes_.find(hashes[i], stride.guess());
    stride.found(index);
    if (index == kNone || !sets_.holds(nodes_[index].held, row, slot)) continue;
    Node& node = nodes_[index];
    ++applied.removed;
    move(node, taken.of(node.held));
    if (!holds(node, slot)) lose(slot, index);
    if (!known(node)) forget(index);
  }
  settle_heir();
  applied.unchanged = count - applied.removed;
  holders_[slot].entries -= applied.removed;
  settle(slot);
  return applied;
}

Applied Index::store_group(u32 slot, u32 row, const i64* hashes, std::size_t count) {
  Applied applied;
  Transition added(sets_, row, slot, true);
  for (std::size_t i = 0; i < count; ++i) {
    Node& node = nodes_[nodes_.find_or_make(hashes[i])];
    if (sets_.holds(node.held, row, slot)) continue;
    move(node, added.of(node.held));
    ++applied.stored;
  }
  applied.unchanged = count - applied.stored;
  holders_[slot].group_entries += applied.stored;
  return applied;
}

Applied Index::remove_group(u32 slot, u32 row, const i64* hashes, std::size_t count) {
  Applied applied;
  Transition taken(sets_, row, slot, false);
  for (std::size_t i = 0; i < count; ++i) {
    const u32 index = nodes_.find(hashes[i]);
    if (index == kNone || !sets_.holds(nodes_[index].held, row, slot)) continue;
    move(nodes_[index], taken.of(nodes_[index].held));
    ++applied.removed;
    free_if_unused(index);
  }
  applied.unchanged = count - applied.removed;
  holders_[slot].group_entries -= applied.removed;
  return applied;
}

void Index::finish(const Applied& applied) {
  if (applied.stored || applied.removed) ++revision_;
  if (sweeping_) sweep(sweep_blocks_);
  if (budget_bytes_) evict_to_budget();
}

u64 Index::clear(u32 slot) {
  Holder& holder = holders_[slot];
  const u64 gone = holder.entries + holder.group_entries;
  if (!gone) return 0;
  blocks_ -= sets_.drop_holder(slot);
  unplaced_ = budget_bytes_ != 0;
  holder = Holder{};
  settle(slot);
  ++revision_;
  if (nothing_held()) {
    reset();
  } else {
    stop_ = swept_;
    sweeping_ = true, wrapped_ = false;
    sweep(sweep_blocks_);
  }
  return gone;
}

bool Index::nothing_held() const {
  return std::none_of(holders_.begin(), holders_.end(),
                      [](const Holder& holder) { return holder.entries || holder.group_entries; });
}

void Index::reset() {
  nodes_.clear();
  sets_.clear();
  uses_.clear();
  unplaced_ = false;
  swept_ = 0;
  sweeping_ = false;
}

// Lets go of what nobody holds, of `most` nodes.
void Index::sweep(u32 most) {
  for (; sweeping_ && most; --most) {
    if (!wrapped_ && swept_ >= nodes_.end()) swept_ = 0, wrapped_ = true;
    if (wrapped_ && swept_ >= stop_) {
      sweeping_ = false;
      return;
    }
    const u32 index = swept_++;
    if (!nodes_.live(index)) continue;
    Node& node = nodes_[index];
    const u32 held = sets_.canonical(node.held);
    if (held != node.held) move(node, held);
    if (!known(node) && node.parent != kNone)
      cut(index);
    else
      free_if_unused(index);
  }
}

// A holder is about to hold a block in one more tier.
void Index::gain(u32 slot, u32 index, u32 parent) {
  Node& node = nodes_[index];
  if (!known(node)) {
    const u32 before = node.parent;  // of a block that a clear has left
    if (before != kNone) {
      nodes_.unlink(index);
      uses_.drop(index);
    }
    nodes_.link(index, parent);
    if (budget_bytes_ && parent != kRoot) uses_.drop(parent);
    if (before < kFreed) free_if_unused(before);
    ++blocks_;
  } else if (holds(node, slot)) {
    return;
  }
  u64& orphans = holders_[slot].orphans;
  // Its children that the holder has are orphans until now: without any, none has to be looked at.
  if (orphans)
    for (u32 child = node.child; child != kNone; child = nodes_[child].next)
      orphans -= holds(nodes_[child], slot);
  if (parent != kRoot && !holds(nodes_[parent], slot)) ++orphans;
}

// A holder has a block in no tier any more.
void Index::lose(u32 slot, u32 index) {
  const Node& node = nodes_[index];
  u64& orphans = holders_[slot].orphans;
  if (node.parent != kRoot && !holds(nodes_[node.parent], slot)) --orphans;
  for (u32 child = node.child; child != kNone; child = nodes_[child].next)
    orphans += holds(nodes_[child], slot);
}

// Nobody holds a block any more.
void Index::forget(u32 index) {
  --blocks_;
  const u32 parent = nodes_.unlink(index);
  if (budget_bytes_) inherit(index, parent);
  free_if_unused(index);
  if (parent != kRoot) free_if_unused(parent);
}

// Takes what a clear has left out of the tree.
void Index::cut(u32 index) {
  const u32 parent = nodes_.unlink(index);
  uses_.drop(index);
  free_if_unused(index);
  if (parent != kRoot) free_if_unused(parent);
}

void Index::free_if_unused(u32 index) {
  const Node& node = nodes_[index];
  if (!sets_.rows(node.held) && node.child == kNone && node.parent == kNone && nodes_.live(index)) {
    sets_.leave(node.held);
    nodes_.free(index);
  }
}

void Index::settle(u32 slot) {
  holders_[slot].orphans ? orphaned_.set(slot) : orphaned_.reset(slot);
}

// -- the budget: core/index_lru.py says who is next.

// Whether a block whose child went is a leaf now. What a clear has left below it does not count, and is cut off.
bool Index::leaf_at_last(u32 index) {
  if (!known(nodes_[index])) return false;
  for (u32 child; (child = nodes_[index].child) != kNone && !known(nodes_[child]);) cut(child);
  return nodes_[index].child == kNone;
}

// A block that nobody holds any more leaves its place to the leaf above, if there is one now.
void Index::inherit(u32 index, u32 parent) {
  if (parent != went_) {
    settle_heir();
    if (parent != kRoot && leaf_at_last(parent)) heir_ = parent;
  }
  went_ = index;
  if (heir_ == kNone) return uses_.drop(index);
  if (!uses_.has(index)) return;
  uses_.pass(index, heir_);
  heir_ = went_ = kNone;
}

void Index::settle_heir() {
  const u32 heir = heir_;
  heir_ = went_ = kNone;
  if (heir != kNone && !uses_.has(heir) && is_leaf(heir)) uses_.touch(heir);
}

// Leaves that a clear has made: as if used now, in the order of their hashes. O(nodes), once after clears.
void Index::place_leaves() {
  std::vector<u32> leaves;
  for (u32 index = 0; index < nodes_.end(); ++index)
    if (is_leaf(index) && !uses_.has(index)) leaves.push_back(index);
  std::sort(leaves.begin(), leaves.end(), [this](u32 a, u32 b) { return nodes_[a].hash < nodes_[b].hash; });
  for (const u32 leaf : leaves) uses_.touch(leaf);
  unplaced_ = false;
}

void Index::evict_to_budget() {
  while (bytes_estimate() > budget_bytes_) {
    if (sweeping_) {
      sweep(1 << 12);
      continue;
    }
    i64 hash;
    if (!evict_next(hash)) return;
  }
}

bool Index::evict_next(i64& hash) {
  while (sweeping_) sweep(1 << 12);
  const u32 index = next_to_evict();
  if (index == kNone) return false;
  hash = nodes_[index].hash;
  evict(index);
  settle_heir();
  ++evicted_;
  ++revision_;
  return true;
}

u32 Index::next_to_evict() {
  if (unplaced_) place_leaves();
  for (u32 index; (index = uses_.oldest()) != kNone; uses_.drop(index))
    if (is_leaf(index)) return index;
  // States of blocks that nobody holds, and cycles of lies: nothing that a match could use.
  for (u32 looked = 0; looked < nodes_.end(); ++looked, ++evict_at_) {
    if (evict_at_ >= nodes_.end()) evict_at_ = 0;
    if (nodes_.live(evict_at_) && sets_.rows(nodes_[evict_at_].held)) return evict_at_;
  }
  return kNone;
}

void Index::evict(u32 index) {
  Node& node = nodes_[index];
  Bits everyone(sets_.words());
  sets_.add_kind(node.held, kBlock, everyone);
  for (u32 row = 0; row < kRows; ++row) {
    const u64* words = sets_.row(node.held, row);
    if (!words) continue;
    Bits holders(sets_.words());
    holders.add(words, sets_.words());
    holders.each([&](u32 slot) {
      row < kTiers ? --holders_[slot].entries : --holders_[slot].group_entries;
    });
  }
  move(node, kNobody);
  everyone.each([&](u32 slot) {
    lose(slot, index);
    settle(slot);
  });
  if (everyone.any())
    forget(index);
  else
    free_if_unused(index);
}

}  // namespace prfaas
