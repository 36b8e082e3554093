// Who holds a block, shared: equal holder sets are kept once, and a block names its set by a number.
//
// A set has up to twelve rows of holders: three kinds (the block itself, its state, its window) in four tiers.
// Number 0 is the empty set. Every number is counted; a set that no block names any more is forgotten. When a
// holder is dropped, its sets are changed where they are: until blocks are moved on (`canonical`), a number may then
// mean what another means too, or the empty set.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "bits.hpp"

namespace prfaas {

using u32 = std::uint32_t;

constexpr u32 kTiers = 4;
constexpr u32 kRows = 12;
enum Kind : u32 { kBlock = 0, kState = 1, kWindow = 2 };
constexpr u32 rows_of(Kind kind) { return 0xFu << (kind * kTiers); }
constexpr u32 row_of(Kind kind, u32 tier) { return kind * kTiers + tier; }
constexpr u32 kNobody = 0;

class HeldSets {
 public:
  HeldSets();
  HeldSets(const HeldSets& other);
  HeldSets& operator=(const HeldSets&) = delete;

  u32 words() const { return words_; }
  // Makes room for holders in slots below 64 * words.
  void widen(u32 words);

  u32 rows(u32 id) const { return sets_[id].rows; }
  bool has_kind(u32 id, Kind kind) const { return sets_[id].rows & rows_of(kind); }
  // The holders in one row, null for none.
  const u64* row(u32 id, u32 row) const {
    const Set& set = sets_[id];
    if (!(set.rows >> row & 1)) return nullptr;
    return set.words.get() + place(set.rows, row);
  }
  bool holds(u32 id, u32 row, u32 slot) const {
    const u64* words = this->row(id, row);
    return words && words[slot >> 6] >> (slot & 63) & 1;
  }
  bool holds_any(u32 id, u32 rows, u32 slot) const;
  // The holders of the block in any tier, `words()` words; of zeros when there is none.
  const u64* block_row(u32 id) const {
    const u64* row = sets_[id].block;
    return row ? row : nobody_.data();
  }
  bool holds_block(u32 id, u32 slot) const { return block_row(id)[slot >> 6] >> (slot & 63) & 1; }
  // The holders in any row of a kind.
  void add_kind(u32 id, Kind kind, Bits& into) const;

  // The number of the set with one entry more or less; the caller then moves the block with `keep` and `leave`.
  u32 with(u32 id, u32 row, u32 slot) { return changed(id, row, slot, true); }
  u32 without(u32 id, u32 row, u32 slot) { return changed(id, row, slot, false); }
  // Takes a holder out of all sets: O(sets), no block moves. Returns how many blocks nobody holds any more.
  u64 drop_holder(u32 slot);
  // The number that means what `id` means; itself, but after `drop_holder`.
  u32 canonical(u32 id);

  void keep(u32 id) { ++sets_[id].uses; }
  void leave(u32 id) {
    if (--sets_[id].uses == 0 && id != kNobody) forget(id);
  }
  // Forgets all, when no block names a set any more.
  void clear();

  // The range of numbers ever given out, and whether one is in use.
  u32 size() const { return static_cast<u32>(sets_.size()); }
  bool used(u32 id) const { return id != kNobody && sets_[id].words; }
  // Whether a drop left the set unlisted.
  bool duplicate(u32 id) const { return id != kNobody && !sets_[id].listed; }
  u32 uses(u32 id) const { return sets_[id].uses; }
  u32 distinct() const { return live_; }
  std::size_t bytes() const;

 private:
  struct Set {
    std::unique_ptr<u64[]> words;
    const u64* block = nullptr;  // in `words`: the holders of the block, null for none
    u32 hash = 0;
    u32 uses = 0;
    u32 rows = 0;
    bool listed = false;  // whether the table finds it
  };

  static bool several_tiers(u32 rows) {
    const u32 tiers = rows & rows_of(kBlock);
    return tiers & (tiers - 1);
  }
  static std::size_t count_of(u32 rows) { return static_cast<std::size_t>(__builtin_popcount(rows)); }
  // Rows of a set, one more behind them for the block's tiers together when these are several.
  std::size_t words_of(u32 rows) const { return (count_of(rows) + several_tiers(rows)) * words_; }
  void unite_tiers(Set& set) const;  // fills that one in, and `block`
  static u32 place_of(u32 rows, u32 row) {
    const u32 before = rows & ((1u << row) - 1);
    return before ? static_cast<u32>(__builtin_popcount(before)) : 0;  // mostly there is one row
  }
  u32 place(u32 rows, u32 row) const { return place_of(rows, row) * words_; }
  u32 changed(u32 id, u32 row, u32 slot, bool present);
  u32 intern(u32 rows, const u64* words);
  u32 find(u32 hash, u32 rows, const u64* words) const;
  void fill(Set& set, u32 hash, u32 rows, const u64* words);
  void empty(Set& set);
  void list(u32 id);
  void unlist(u32 id);
  void forget(u32 id);
  void rehash(std::size_t capacity);
  std::size_t home(u32 hash) const { return hash & (table_.size() - 1); }

  u32 words_ = 1;
  u32 live_ = 0;
  std::size_t row_words_ = 0;
  std::vector<Set> sets_;
  std::vector<u32> free_;
  std::vector<u32> table_;  // numbers by hash; 0 is an empty place
  std::vector<u64> scratch_;
  std::vector<u64> nobody_;
};

// Moves many blocks by the same change: looks a set's successor up once as long as the sets repeat.
class Transition {
 public:
  Transition(HeldSets& sets, u32 row, u32 slot, bool present)
      : sets_(sets), row_(row), slot_(slot), present_(present) {}
  Transition(const Transition&) = delete;
  Transition& operator=(const Transition&) = delete;
  ~Transition() { unpin(); }

  u32 of(u32 from) {
    if (!pinned_ || from != from_) {
      const u32 to = present_ ? sets_.with(from, row_, slot_) : sets_.without(from, row_, slot_);
      sets_.keep(from);
      sets_.keep(to);
      unpin();
      from_ = from, to_ = to, pinned_ = true;
    }
    return to_;
  }

 private:
  void unpin() {
    if (!pinned_) return;
    sets_.leave(from_);
    sets_.leave(to_);
    pinned_ = false;
  }

  HeldSets& sets_;
  u32 row_, slot_;
  bool present_;
  bool pinned_ = false;
  u32 from_ = 0, to_ = 0;
};

}  // namespace prfaas
