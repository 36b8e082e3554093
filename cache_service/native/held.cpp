#include "held.hpp"

#include <cstring>

namespace prfaas {

namespace {

u32 hash_of(u32 rows, const u64* words, std::size_t count) {
  u64 hash = rows * 0x9E3779B97F4A7C15ull;
  for (std::size_t i = 0; i < count; ++i) {
    hash = (hash ^ words[i]) * 0xFF51AFD7ED558CCDull;
    hash ^= hash >> 32;
  }
  return static_cast<u32>(hash ^ hash >> 29);
}

}  // namespace

HeldSets::HeldSets() : sets_(1), table_(16, 0), nobody_(1, 0) { sets_[0].uses = 1; }

HeldSets::HeldSets(const HeldSets& other)
    : words_(other.words_),
      live_(other.live_),
      row_words_(other.row_words_),
      sets_(other.sets_.size()),
      free_(other.free_),
      table_(other.table_),
      nobody_(other.nobody_) {
  for (std::size_t id = 0; id < sets_.size(); ++id) {
    const Set& from = other.sets_[id];
    Set& to = sets_[id];
    to.hash = from.hash, to.uses = from.uses, to.rows = from.rows, to.listed = from.listed;
    if (!from.words) continue;
    const std::size_t count = words_of(from.rows);
    to.words = std::make_unique<u64[]>(count);
    std::memcpy(to.words.get(), from.words.get(), count * sizeof(u64));
    if (from.block) to.block = to.words.get() + (from.block - from.words.get());
  }
}

void HeldSets::widen(u32 words) {
  const u32 narrow = words_;
  words_ = words;
  nobody_.assign(words, 0);
  row_words_ = row_words_ / narrow * words;
  for (Set& set : sets_) {
    if (!set.words) continue;
    auto wider = std::make_unique<u64[]>(words_of(set.rows));
    for (std::size_t i = 0; i < count_of(set.rows); ++i)
      std::memcpy(wider.get() + i * words, set.words.get() + i * narrow, narrow * sizeof(u64));
    set.words = std::move(wider);
    set.hash = hash_of(set.rows, set.words.get(), count_of(set.rows) * words);
    unite_tiers(set);
  }
  rehash(table_.size());
}

void HeldSets::unite_tiers(Set& set) const {
  set.block = set.rows & rows_of(kBlock) ? set.words.get() : nullptr;
  if (!several_tiers(set.rows)) return;
  u64* together = set.words.get() + count_of(set.rows) * words_;
  const u64* words = set.words.get();  // the tiers come first
  for (u32 rest = set.rows & rows_of(kBlock); rest; rest &= rest - 1, words += words_)
    for (u32 i = 0; i < words_; ++i) together[i] |= words[i];
  set.block = together;
}

bool HeldSets::holds_any(u32 id, u32 rows, u32 slot) const {
  const Set& set = sets_[id];
  const u64 bit = u64{1} << (slot & 63);
  const u64* words = set.words.get() + (slot >> 6);
  for (u32 rest = set.rows; rest; rest &= rest - 1, words += words_)
    if (rows >> __builtin_ctz(rest) & 1 && *words & bit) return true;
  return false;
}

void HeldSets::add_kind(u32 id, Kind kind, Bits& into) const {
  const Set& set = sets_[id];
  u32 rest = set.rows & rows_of(kind);
  if (!rest) return;
  const u64* words = set.words.get() + place(set.rows, static_cast<u32>(__builtin_ctz(rest)));
  for (; rest; rest &= rest - 1, words += words_) into.add(words, words_);
}

u32 HeldSets::changed(u32 id, u32 row, u32 slot, bool present) {
  const Set& from = sets_[id];
  const u32 bit_of_row = 1u << row;
  u32 rows = from.rows | bit_of_row;
  const u32 before = place_of(rows, row);
  const u32 total = static_cast<u32>(__builtin_popcount(rows));
  scratch_.assign(std::size_t{total} * words_, 0);
  u64* mine = scratch_.data() + std::size_t{before} * words_;
  if (from.rows == rows) {
    std::memcpy(scratch_.data(), from.words.get(), scratch_.size() * sizeof(u64));
  } else if (from.rows) {
    std::memcpy(scratch_.data(), from.words.get(), std::size_t{before} * words_ * sizeof(u64));
    std::memcpy(mine + words_, from.words.get() + std::size_t{before} * words_,
                std::size_t{total - 1 - before} * words_ * sizeof(u64));
  }
  const u64 bit = u64{1} << (slot & 63);
  mine[slot >> 6] = present ? mine[slot >> 6] | bit : mine[slot >> 6] & ~bit;
  bool empty = true;
  for (u32 i = 0; i < words_; ++i) empty = empty && !mine[i];
  if (empty) {
    std::memmove(mine, mine + words_, std::size_t{total - 1 - before} * words_ * sizeof(u64));
    rows &= ~bit_of_row;
  }
  return intern(rows, scratch_.data());
}

u64 HeldSets::drop_holder(u32 slot) {
  u64 lost = 0;
  for (u32 id = 1; id < sets_.size(); ++id) {
    Set& set = sets_[id];
    if (!set.words || !holds_any(id, (1u << kRows) - 1, slot)) continue;
    scratch_.clear();
    u32 rows = 0;
    const u64* words = set.words.get();
    for (u32 rest = set.rows; rest; rest &= rest - 1, words += words_) {
      const std::size_t start = scratch_.size();
      scratch_.insert(scratch_.end(), words, words + words_);
      scratch_[start + (slot >> 6)] &= ~(u64{1} << (slot & 63));
      bool empty = true;
      for (u32 i = 0; i < words_; ++i) empty = empty && !scratch_[start + i];
      if (empty)
        scratch_.resize(start);
      else
        rows |= rest & -rest;
    }
    if (set.block && !(rows & rows_of(kBlock))) lost += set.uses;
    if (set.listed) unlist(id);
    empty(set);
    if (!rows) continue;
    fill(set, hash_of(rows, scratch_.data(), scratch_.size()), rows, scratch_.data());
    if (find(set.hash, rows, scratch_.data()) == kNobody) list(id);
  }
  return lost;
}

u32 HeldSets::canonical(u32 id) {
  const Set& set = sets_[id];
  if (set.listed || id == kNobody) return id;
  if (!set.rows) return kNobody;
  const u32 found = find(set.hash, set.rows, set.words.get());
  if (found != kNobody) return found;
  list(id);
  return id;
}

void HeldSets::clear() {
  sets_.clear();
  sets_.resize(1);
  sets_[0].uses = 1;
  free_.clear();
  table_.assign(16, 0);
  live_ = 0;
  row_words_ = 0;
}

u32 HeldSets::find(u32 hash, u32 rows, const u64* words) const {
  const std::size_t bytes = count_of(rows) * words_ * sizeof(u64);
  for (std::size_t at = home(hash); table_[at]; at = home(static_cast<u32>(at) + 1)) {
    const Set& set = sets_[table_[at]];
    if (set.hash == hash && set.rows == rows && std::memcmp(set.words.get(), words, bytes) == 0)
      return table_[at];
  }
  return kNobody;
}

u32 HeldSets::intern(u32 rows, const u64* words) {
  if (!rows) return kNobody;
  const u32 hash = hash_of(rows, words, count_of(rows) * words_);
  const u32 found = find(hash, rows, words);
  if (found != kNobody) return found;
  u32 id;
  if (free_.empty()) {
    id = static_cast<u32>(sets_.size());
    sets_.emplace_back();
  } else {
    id = free_.back();
    free_.pop_back();
  }
  fill(sets_[id], hash, rows, words);
  list(id);
  return id;
}

void HeldSets::fill(Set& set, u32 hash, u32 rows, const u64* words) {
  set.words = std::make_unique<u64[]>(words_of(rows));
  std::memcpy(set.words.get(), words, count_of(rows) * words_ * sizeof(u64));
  set.hash = hash, set.rows = rows;
  unite_tiers(set);
  row_words_ += words_of(rows);
  ++live_;
}

void HeldSets::empty(Set& set) {
  row_words_ -= words_of(set.rows);
  --live_;
  set.words.reset();
  set.block = nullptr;
  set.rows = 0;
}

void HeldSets::list(u32 id) {
  sets_[id].listed = true;
  if (live_ * 2 > table_.size()) return rehash(table_.size() * 2);
  std::size_t at = home(sets_[id].hash);
  while (table_[at]) at = home(static_cast<u32>(at) + 1);
  table_[at] = id;
}

void HeldSets::unlist(u32 id) {
  sets_[id].listed = false;
  std::size_t hole = home(sets_[id].hash);
  while (table_[hole] != id) hole = home(static_cast<u32>(hole) + 1);
  // No tombstones: what was pushed past the hole moves back into it.
  const std::size_t mask = table_.size() - 1;
  for (std::size_t at = (hole + 1) & mask; table_[at]; at = (at + 1) & mask) {
    const std::size_t wanted = home(sets_[table_[at]].hash);
    if (((at - wanted) & mask) >= ((at - hole) & mask)) {
      table_[hole] = table_[at];
      hole = at;
    }
  }
  table_[hole] = 0;
}

void HeldSets::forget(u32 id) {
  Set& set = sets_[id];
  if (set.listed) unlist(id);
  if (set.words) empty(set);
  free_.push_back(id);
}

void HeldSets::rehash(std::size_t capacity) {
  table_.assign(capacity, 0);
  for (u32 id = 1; id < sets_.size(); ++id) {
    if (!sets_[id].listed) continue;
    std::size_t at = home(sets_[id].hash);
    while (table_[at]) at = home(static_cast<u32>(at) + 1);
    table_[at] = id;
  }
}

std::size_t HeldSets::bytes() const {
  constexpr std::size_t kAllocation = 16;  // what malloc adds to a set of its own
  return live_ * (sizeof(Set) + kAllocation + 2 * sizeof(u32)) + row_words_ * sizeof(u64);
}

}  // namespace prfaas
