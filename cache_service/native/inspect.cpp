// What the index says of itself: sizes, its content as runs, and whether its invariants hold.
#include <cstring>
#include <map>

#include "index.hpp"

namespace prfaas {

namespace {

std::vector<u32> slots_of(const u64* words, u32 count) {
  Bits holders(count);
  holders.add(words, count);
  std::vector<u32> slots;
  holders.each([&](u32 slot) { slots.push_back(slot); });
  return slots;
}

}  // namespace

Counts Index::counts() const {
  Counts counts;
  counts.blocks = blocks_;
  for (const Holder& holder : holders_) {
    counts.entries += holder.entries;
    counts.orphans += holder.orphans;
    counts.group_entries += holder.group_entries;
  }
  return counts;
}

u64 Index::bytes_estimate() const {
  return nodes_.bytes() + sets_.bytes() + (budget_bytes_ ? uses_.bytes(nodes_.count()) : 0);
}

u64 Index::runs(std::vector<Run>* into, std::size_t longest) const {
  u64 found = 0;
  std::vector<bool> seen(nodes_.end());
  for (u32 tier = 0; tier < kTiers; ++tier) {
    const u32 row = row_of(kBlock, tier);
    u64 reached = 0, held = 0;
    const auto same = [&](u32 a, u32 b) {
      const u64 *first = sets_.row(nodes_[a].held, row), *second = sets_.row(nodes_[b].held, row);
      return first && second &&
             (first == second || !std::memcmp(first, second, sets_.words() * sizeof(u64)));
    };
    // The next block of the same run, kNone at its end.
    const auto next = [&](u32 index) {
      u32 only = kNone;
      for (u32 child = nodes_[index].child; child != kNone; child = nodes_[child].next) {
        if (!known(nodes_[child])) continue;  // a clear has left it
        if (only != kNone) return kNone;
        only = child;
      }
      return only != kNone && same(index, only) ? only : kNone;
    };
    const auto begin = [&](u32 index) {
      ++found;
      if (!into) return;
      into->push_back(Run{{}, nodes_[index].parent, tier,
                          slots_of(sets_.row(nodes_[index].held, row), sets_.words())});
    };
    const auto follow = [&](u32 index, bool alone) {
      for (std::size_t length = 0; index != kNone; index = alone ? kNone : next(index), ++length) {
        if (length % longest == 0) begin(index);
        if (into) into->back().hashes.push_back(nodes_[index].hash);
        seen[index] = true;
        ++reached;
      }
    };
    seen.assign(nodes_.end(), false);
    for (u32 index = 0; index < nodes_.end(); ++index) {
      if (!nodes_.live(index) || !sets_.row(nodes_[index].held, row)) continue;
      ++held;
      const u32 parent = nodes_[index].parent;
      if (parent == kRoot || next(parent) != index) follow(index, false);
    }
    if (reached == held) continue;
    // Only lies make a cycle of parents, which no run reaches: its blocks one by one.
    for (u32 index = 0; index < nodes_.end(); ++index)
      if (nodes_.live(index) && sets_.row(nodes_[index].held, row) && !seen[index]) follow(index, true);
  }
  return found;
}

std::vector<Grouped> Index::grouped(std::size_t longest) const {
  std::vector<Grouped> found;
  for (u32 row = kTiers; row < kRows; ++row) {
    std::map<std::vector<u64>, std::size_t> open;
    for (u32 index = 0; index < nodes_.end(); ++index) {
      const u64* words = nodes_.live(index) ? sets_.row(nodes_[index].held, row) : nullptr;
      if (!words) continue;
      const auto [at, fresh] =
          open.try_emplace(std::vector<u64>(words, words + sets_.words()), found.size());
      if (!fresh && found[at->second].hashes.size() >= longest) at->second = found.size();
      if (at->second == found.size()) found.push_back(Grouped{{}, row, slots_of(words, sets_.words())});
      found[at->second].hashes.push_back(nodes_[index].hash);
    }
  }
  return found;
}

std::string Index::check() const {
  for (auto part : {&Index::check_nodes, &Index::check_holders, &Index::check_budget})
    if (std::string problem = (this->*part)(); !problem.empty()) return problem;
  return "";
}

std::string Index::check_nodes() const {
  u64 live = 0, known_blocks = 0, linked = 0, children = 0;
  std::vector<u32> uses(sets_.size(), 0);
  for (u32 index = 0; index < nodes_.end(); ++index) {
    if (!nodes_.live(index)) continue;
    const Node& node = nodes_[index];
    ++live;
    ++uses[node.held];
    if (nodes_.find(node.hash) != index) return "a block that its hash does not find";
    if (known(node)) {
      ++known_blocks;
      if (node.parent == kNone) return "a held block without a parent";
      if (node.parent != kRoot) {
        ++linked;
        if (!nodes_.live(node.parent)) return "a parent that is gone";
      }
    } else if (node.parent != kNone) {
      if (!sweeping_) return "a block that nobody holds has a parent";
      linked += node.parent != kRoot;
    } else if (node.child == kNone && node.held == kNobody && !sweeping_) {
      return "a block that nothing needs";
    }
    if (!sweeping_ && sets_.duplicate(node.held)) return "a holder set that another equals";
    u32 before = kNone;
    for (u32 child = node.child; child != kNone; child = nodes_[child].next) {
      if (!nodes_.live(child) || nodes_[child].parent != index || nodes_[child].prev != before)
        return "children are not the inverse of parents";
      before = child;
      if (++children > nodes_.count()) return "a ring of siblings";
    }
  }
  if (live != nodes_.count()) return "the number of nodes is wrong";
  if (known_blocks != blocks_) return "the number of blocks is wrong";
  if (linked != children) return "a block that its parent does not know";
  for (u32 id = 1; id < sets_.size(); ++id) {
    if (!sets_.used(id)) continue;
    if (uses[id] != sets_.uses(id) || !uses[id]) return "a holder set is counted wrong";
    for (u32 rest = sets_.rows(id); rest; rest &= rest - 1)
      if (slots_of(sets_.row(id, static_cast<u32>(__builtin_ctz(rest))), sets_.words()).empty())
        return "an empty row of holders";
  }
  return "";
}

std::string Index::check_holders() const {
  std::vector<Holder> counted(sets_.words() * 64);
  for (u32 index = 0; index < nodes_.end(); ++index) {
    if (!nodes_.live(index)) continue;
    const Node& node = nodes_[index];
    for (u32 rest = sets_.rows(node.held); rest; rest &= rest - 1) {
      const u32 row = static_cast<u32>(__builtin_ctz(rest));
      for (const u32 slot : slots_of(sets_.row(node.held, row), sets_.words()))
        row < kTiers ? ++counted[slot].entries : ++counted[slot].group_entries;
    }
    if (!known(node) || node.parent == kRoot) continue;
    Bits without_parent(sets_.words()), above(sets_.words());
    sets_.add_kind(node.held, kBlock, without_parent);
    sets_.add_kind(nodes_[node.parent].held, kBlock, above);
    without_parent -= above;
    without_parent.each([&](u32 slot) { ++counted[slot].orphans; });
  }
  for (u32 slot = 0; slot < counted.size(); ++slot) {
    const Holder known_of = slot < holders_.size() ? holders_[slot] : Holder{};
    if (counted[slot].entries != known_of.entries) return "a holder's entries are counted wrong";
    if (counted[slot].group_entries != known_of.group_entries)
      return "a holder's group entries are counted wrong";
    if (counted[slot].orphans != known_of.orphans) return "a holder's orphans are counted wrong";
    if (orphaned_.has(slot) != (known_of.orphans > 0)) return "a holder's orphans are not marked";
  }
  Bits members(sets_.words());
  for (const Needs& needs : needs_) {
    if (!needs.members.any() || (!needs.state && !needs.window_blocks)) return "needs of nobody";
    if ((needs.members & members).any()) return "a holder has two needs";
    members |= needs.members;
  }
  return "";
}

std::string Index::check_budget() const {
  if (std::string problem = uses_.check(nodes_.end()); !problem.empty()) return problem;
  for (u32 index = 0; index < nodes_.end(); ++index) {
    const bool placed = uses_.has(index);
    if (placed && (!nodes_.live(index) || (!known(nodes_[index]) && !sweeping_)))
      return "a place of a block that nobody holds";
    if (budget_bytes_ && !placed && !unplaced_ && is_leaf(index)) return "a leaf that eviction would not find";
  }
  if (!budget_bytes_) return uses_.oldest() == kNone ? "" : "places without a budget";
  return bytes_estimate() <= budget_bytes_ ? "" : "over the budget";
}

}  // namespace prfaas
