// The Python face: numbers and tuples in and out. What they mean is said in index.py beside this file.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "batch.hpp"
#include "index.hpp"

namespace nb = nanobind;

namespace {

using prfaas::i64;
using prfaas::u32;
using prfaas::u64;

constexpr std::size_t kLongest = 1u << 20;  // MAX_BLOCKS_PER_EVENT

nb::object number(i64 value) { return nb::steal(PyLong_FromLongLong(value)); }

// A list or tuple of ints, read in place.
class PyQuery : public prfaas::Query {
 public:
  explicit PyQuery(nb::handle hashes) : items_(nb::steal(PySequence_Fast(hashes.ptr(), "hashes: give a sequence"))) {
    if (!items_.is_valid()) throw nb::python_error();
  }
  std::size_t size() const override { return static_cast<std::size_t>(PySequence_Fast_GET_SIZE(items_.ptr())); }
  bool at(std::size_t position, i64& hash) const override {
    int overflow = 0;
    PyObject* item = PySequence_Fast_GET_ITEM(items_.ptr(), static_cast<Py_ssize_t>(position));
    hash = PyLong_AsLongLongAndOverflow(item, &overflow);
    if (hash == -1 && PyErr_Occurred()) throw nb::python_error();
    return !overflow;
  }

 private:
  nb::object items_;
};

std::vector<i64> hashes_of(nb::handle hashes) {
  const PyQuery items(hashes);
  std::vector<i64> values(items.size());
  for (std::size_t i = 0; i < values.size(); ++i)
    if (!items.at(i, values[i])) throw nb::value_error("hashes: a value is not a signed 64-bit hash");
  return values;
}

nb::tuple tuple_of(const i64* hashes, std::size_t count) {
  PyObject* items = PyTuple_New(static_cast<Py_ssize_t>(count));
  if (!items) throw nb::python_error();
  nb::tuple tuple = nb::steal<nb::tuple>(items);
  for (std::size_t i = 0; i < count; ++i)
    PyTuple_SET_ITEM(items, static_cast<Py_ssize_t>(i), number(hashes[i]).release().ptr());
  return tuple;
}

nb::tuple tuple_of(const prfaas::Applied& applied) {
  return nb::make_tuple(applied.stored, applied.removed, applied.unchanged, applied.conflicts);
}

class PyIndex {
 public:
  PyIndex(u64 budget_bytes, u32 sweep_blocks, nb::object match_type)
      : index_(budget_bytes, sweep_blocks), match_type_(std::move(match_type)) {}

  // By slot the holder's name (None for a free slot), and the slots in the order of names.
  void name(nb::list sources, std::vector<u32> order) {
    index_.reserve_slots(static_cast<u32>(sources.size()));
    sources_ = std::move(sources);
    order_ = std::move(order);
    rank_.assign(sources_.size(), 0);
    for (u32 rank = 0; rank < order_.size(); ++rank) rank_.at(order_[rank]) = rank;
  }

  nb::tuple store(u32 slot, u32 tier, nb::handle hashes, nb::handle parent) {
    const std::vector<i64> values = hashes_of(hashes);
    i64 above = 0;
    if (!parent.is_none()) above = nb::cast<i64>(parent);
    return done(index_.store(slot, tier, values.data(), values.size(), parent.is_none() ? nullptr : &above));
  }
  nb::tuple remove(u32 slot, u32 tier, nb::handle hashes) {
    const std::vector<i64> values = hashes_of(hashes);
    return done(index_.remove(slot, tier, values.data(), values.size()));
  }
  nb::tuple store_group(u32 slot, u32 row, nb::handle hashes) {
    const std::vector<i64> values = hashes_of(hashes);
    return done(index_.store_group(slot, row, values.data(), values.size()));
  }
  nb::tuple remove_group(u32 slot, u32 row, nb::handle hashes) {
    const std::vector<i64> values = hashes_of(hashes);
    return done(index_.remove_group(slot, row, values.data(), values.size()));
  }

  nb::list apply_batch(u32 slot, const prfaas::Batch& batch) {
    nb::list applied;
    for (const auto& event : batch.events) {
      const i64* hashes = batch.hashes.data() + event.first;
      prfaas::Applied one;
      switch (event.type) {
        case prfaas::Batch::Type::kStored:
          one = index_.store(slot, event.row, hashes, event.count, event.below ? &event.parent : nullptr);
          index_.finish(one);
          break;
        case prfaas::Batch::Type::kRemoved:
          one = index_.remove(slot, event.row, hashes, event.count);
          index_.finish(one);
          break;
        case prfaas::Batch::Type::kGroupStored:
          one = index_.store_group(slot, event.row, hashes, event.count);
          index_.finish(one);
          break;
        case prfaas::Batch::Type::kGroupRemoved:
          one = index_.remove_group(slot, event.row, hashes, event.count);
          index_.finish(one);
          break;
        case prfaas::Batch::Type::kCleared:
          one.removed = index_.clear(slot);
          break;
      }
      applied.append(tuple_of(one));
    }
    return applied;
  }

  nb::object match(nb::handle hashes, nb::handle limit_blocks) {
    const PyQuery query(hashes);
    std::size_t limit = query.size();
    if (!limit_blocks.is_none()) limit = static_cast<std::size_t>(std::max<i64>(0, nb::cast<i64>(limit_blocks)));
    const prfaas::Answer answer = index_.match(query, limit);
    std::vector<u32> slots;  // of all answers, depth by depth
    std::vector<std::size_t> ends;
    for (const auto& depth : answer.depths) {
      by_name(depth.holders, slots);
      ends.push_back(slots.size());
    }
    nb::object found = nb::steal(PyList_New(static_cast<Py_ssize_t>(slots.size())));
    if (!found.is_valid()) throw nb::python_error();
    std::size_t at = 0;
    for (std::size_t i = 0; i < ends.size(); ++i) {
      const std::size_t depth = answer.depths[i].matched;
      const nb::object matched = number(static_cast<i64>(depth));
      const nb::object whole = depth <= limit ? matched : number(static_cast<i64>(limit));
      for (; at < ends[i]; ++at) {
        const std::size_t usable = answer.usable.empty() ? prfaas::Answer::kWhole : answer.usable[slots[at]];
        PyObject* match = usable == prfaas::Answer::kWhole
                              ? new_match(slots[at], matched, whole)
                              : new_match(slots[at], matched, number(static_cast<i64>(usable)));
        PyList_SET_ITEM(found.ptr(), static_cast<Py_ssize_t>(at), match);
      }
    }
    return found;
  }

  nb::tuple counts() const {
    const prfaas::Counts counts = index_.counts();
    return nb::make_tuple(counts.blocks, counts.entries, counts.orphans, counts.group_entries);
  }
  nb::list runs() const {
    std::vector<prfaas::Run> found;
    index_.runs(&found, kLongest);
    nb::list runs;
    for (const auto& run : found) {
      const nb::object parent = run.parent == prfaas::kRoot ? nb::none() : number(index_.hash_of(run.parent));
      runs.append(nb::make_tuple(tuple_of(run.hashes.data(), run.hashes.size()), parent, run.tier, run.slots));
    }
    return runs;
  }
  nb::list grouped() const {
    nb::list parts;
    for (const auto& part : index_.grouped(kLongest))
      parts.append(nb::make_tuple(part.row, tuple_of(part.hashes.data(), part.hashes.size()), part.slots));
    return parts;
  }

  nb::object evict_next() {
    i64 hash;
    return index_.evict_next(hash) ? number(hash) : nb::none();
  }
  PyIndex copy() const { return *this; }
  prfaas::Index& core() { return index_; }
  const prfaas::Index& core() const { return index_; }

 private:
  nb::tuple done(const prfaas::Applied& applied) {
    index_.finish(applied);
    return tuple_of(applied);
  }

  // Appends the holders in the order of their names.
  void by_name(const prfaas::Bits& holders, std::vector<u32>& slots) const {
    const std::size_t first = slots.size();
    holders.each([&](u32 slot) { slots.push_back(slot); });
    if (slots.size() - first == 1) return;
    if ((slots.size() - first) * 8 < order_.size()) {
      std::sort(slots.begin() + static_cast<std::ptrdiff_t>(first), slots.end(),
                [this](u32 a, u32 b) { return rank_[a] < rank_[b]; });
      return;
    }
    slots.resize(first);
    for (const u32 slot : order_)
      if (holders.has(slot)) slots.push_back(slot);
  }

  // A named tuple made without calling its class, which would take most of the time of a match.
  PyObject* new_match(u32 slot, const nb::object& matched, const nb::object& usable) const {
    auto* type = reinterpret_cast<PyTypeObject*>(match_type_.ptr());
    PyObject* match = type->tp_alloc(type, 3);
    if (!match) throw nb::python_error();
    PyTuple_SET_ITEM(match, 0, Py_NewRef(PyList_GET_ITEM(sources_.ptr(), static_cast<Py_ssize_t>(slot))));
    PyTuple_SET_ITEM(match, 1, matched.inc_ref().ptr());
    PyTuple_SET_ITEM(match, 2, usable.inc_ref().ptr());
    return match;
  }

  prfaas::Index index_;
  nb::object match_type_;
  nb::list sources_;
  std::vector<u32> order_, rank_;
};

using Decode = bool (*)(const unsigned char*, std::size_t, i64, i64, prfaas::Batch&);

template <Decode decode>
nb::object decoded(nb::bytes payload, i64 page_size, i64 dp_rank) {
  prfaas::Batch batch;
  const auto* data = reinterpret_cast<const unsigned char*>(payload.c_str());
  if (!decode(data, payload.size(), page_size, dp_rank, batch)) return nb::none();
  return nb::cast(std::move(batch));
}

nb::object decoded_page(nb::bytes payload, i64 page_size) {
  prfaas::Batch batch;
  prfaas::Page page;
  const auto* data = reinterpret_cast<const unsigned char*>(payload.c_str());
  if (!prfaas::decode_worker_page(data, payload.size(), page_size, page, batch)) return nb::none();
  const nb::bytes anchor(page.anchor.data(), page.anchor.size());
  return nb::make_tuple(page.dump, page.page, page.pages, page.seq, anchor, nb::cast(std::move(batch)));
}

nb::object needs_of(const prfaas::Batch& batch) {
  if (!batch.declared) return nb::none();
  return nb::make_tuple(batch.needs_state, batch.window_blocks);
}

nb::tuple event_of(const prfaas::Batch& batch, std::size_t position) {
  if (position >= batch.events.size()) throw nb::index_error();
  const auto& event = batch.events[position];
  const nb::object parent = event.below ? number(event.parent) : nb::none();
  return nb::make_tuple(static_cast<u32>(event.type), event.row, parent,
                        tuple_of(batch.hashes.data() + event.first, event.count));
}

}  // namespace

NB_MODULE(_index, module) {
  nb::set_leak_warnings(false);
  nb::class_<prfaas::Batch>(module, "Batch")
      .def_ro("sent_unix_s", &prfaas::Batch::sent_unix_s)
      .def_prop_ro("needs", &needs_of)
      .def("__len__", [](const prfaas::Batch& batch) { return batch.events.size(); })
      .def("event", &event_of);
  module.def("decode_sglang", &decoded<prfaas::decode_plain>);
  module.def("decode_prfaas", &decoded<prfaas::decode_worker_batch>);
  module.def("decode_page", &decoded_page);
  nb::class_<PyIndex>(module, "Index")
      .def(nb::init<u64, u32, nb::object>())
      .def("name", &PyIndex::name)
      .def("release", [](PyIndex& self, u32 slot) { self.core().release_slot(slot); })
      .def("declare", [](PyIndex& self, u32 slot, bool state, u32 window) { self.core().declare(slot, state, window); })
      .def("quarantine", [](PyIndex& self, u32 slot, bool on) { self.core().quarantine(slot, on); })
      .def("store", &PyIndex::store, nb::arg("slot"), nb::arg("tier"), nb::arg("hashes"), nb::arg("parent").none())
      .def("remove", &PyIndex::remove)
      .def("store_group", &PyIndex::store_group)
      .def("remove_group", &PyIndex::remove_group)
      .def("apply_batch", &PyIndex::apply_batch)
      .def("clear", [](PyIndex& self, u32 slot) { return self.core().clear(slot); })
      .def("match", &PyIndex::match, nb::arg("hashes"), nb::arg("limit_blocks").none())
      .def("entries", [](const PyIndex& self, u32 slot) { return self.core().entries(slot); })
      .def("counts", &PyIndex::counts)
      .def("nodes", [](const PyIndex& self) { return self.core().runs(nullptr, kLongest); })
      .def("evict_next", &PyIndex::evict_next)
      .def("runs", &PyIndex::runs)
      .def("grouped", &PyIndex::grouped)
      .def("copy", &PyIndex::copy)
      .def("check", [](const PyIndex& self) { return self.core().check(); })
      .def_prop_ro("revision", [](const PyIndex& self) { return self.core().revision(); })
      .def_prop_ro("evicted", [](const PyIndex& self) { return self.core().evicted(); })
      .def_prop_ro("bytes_estimate", [](const PyIndex& self) { return self.core().bytes_estimate(); });
}
