// The pybind11 module selfforcing_ext._C: what is no tensor op.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "geometry/page_table.h"
#include "simd/isa.h"

namespace py = pybind11;
using selfforcing::PageTable;

namespace {

std::pair<int64_t, PageTable::Copies> advance(
    PageTable& table, const std::vector<std::tuple<int64_t, PageTable::Ranges, PageTable::Range, bool>>& steps) {
  std::vector<PageTable::Step> all;
  for (const auto& [stream, kept, written, again] : steps) all.push_back({stream, kept, written, again});
  PageTable::Advanced result = table.advance(all);
  return {result.shortage, std::move(result.copies)};
}

// Writing into a table of another type or layout would write into a converted copy.
void copy_rows(const PageTable& table, const std::vector<int64_t>& streams, const py::buffer& rows) {
  const py::buffer_info info = rows.request(/*writable=*/true);
  const bool packed = info.ndim == 2 && info.item_type_is_equivalent_to<int32_t>() &&
                      info.strides[1] == sizeof(int32_t) &&
                      info.strides[0] == info.shape[1] * static_cast<py::ssize_t>(sizeof(int32_t));
  if (!packed || info.shape[0] != static_cast<py::ssize_t>(streams.size()))
    throw std::invalid_argument("table must be a contiguous int32 array with a row for each of the " +
                                std::to_string(streams.size()) + " streams");
  table.copy_rows(streams, static_cast<int32_t*>(info.ptr), info.shape[1]);
}

py::array_t<int32_t> positions(const PageTable& table, const std::vector<int64_t>& streams,
                               const py::array_t<int64_t, py::array::c_style | py::array::forcecast>& tokens) {
  const py::ssize_t ndim = tokens.ndim();
  if (ndim < 3 || tokens.shape(ndim - 1) != 2 || tokens.shape(ndim - 3) != static_cast<py::ssize_t>(streams.size()))
    throw std::invalid_argument("tokens must be [..., streams, ranges, 2] for " + std::to_string(streams.size()) +
                                " streams");
  py::array_t<int32_t> result(std::vector<py::ssize_t>(tokens.shape(), tokens.shape() + ndim));
  const int64_t* from = tokens.data();
  int32_t* to = result.mutable_data();
  const py::ssize_t ranges = tokens.shape(ndim - 2), num_streams = tokens.shape(ndim - 3);
  for (py::ssize_t i = 0; i < tokens.size() / 2; ++i) {
    const auto [start, end] = table.position(streams[i / ranges % num_streams], {from[2 * i], from[2 * i + 1]});
    to[2 * i] = static_cast<int32_t>(start), to[2 * i + 1] = static_cast<int32_t>(end);
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Page tables, the choice of instruction set, and what this build contains.";

  m.def(
      "cpu_isa", [] { return selfforcing::isa_name(selfforcing::active_isa()); },
      "The instruction set that the CPU kernels use here (SELFFORCING_CPU_ISA forces one).");
  m.def(
      "cpu_isas",
      [] {
        std::vector<std::string> names;
        for (const selfforcing::Isa isa : selfforcing::kIsasBestFirst)
          if (selfforcing::machine_has(isa)) names.emplace_back(selfforcing::isa_name(isa));
        return names;
      },
      "The instruction sets that this machine and this build have, best first.");
  m.attr("compiler") = SELFFORCING_COMPILER;
  m.attr("torch_version") = SELFFORCING_TORCH_VERSION;
  m.attr("cuda_architectures") = SELFFORCING_CUDA_ARCHITECTURES;  // as CMake names them, such as "80 90a"
  m.attr("cuda_toolkit") = SELFFORCING_CUDA_TOOLKIT;              // empty without CUDA, like the architectures

  py::class_<PageTable> table(m, "PageTable",
                              "Which pages of a pool hold which tokens of which stream (csrc/geometry/page_table.h).");
  py::class_<PageTable::Stats>(table, "Stats")
      .def_readonly("used", &PageTable::Stats::used)
      .def_readonly("shared", &PageTable::Stats::shared)
      .def_readonly("pinned", &PageTable::Stats::pinned);
  table.def(py::init<int64_t>(), py::arg("page_size"))
      .def_property_readonly("page_size", &PageTable::page_size)
      .def_property_readonly("num_pages", &PageTable::num_pages)
      .def_property_readonly("num_free_pages", &PageTable::num_free_pages)
      .def("stats", &PageTable::stats)
      .def("add_pages", &PageTable::add_pages, py::arg("count"))
      .def("open", &PageTable::open)
      .def("fork", &PageTable::fork, py::arg("stream"))
      .def("close", &PageTable::close, py::arg("stream"))
      .def("advance", &advance, py::arg("steps"),
           "Steps (stream, kept ranges, written range, written again), all or none; the pages that are missing, and "
           "copies to make.")
      .def("retain", &PageTable::retain, py::arg("stream"), py::arg("tokens"))
      .def("row", &PageTable::row, py::arg("stream"))
      .def("row_length", &PageTable::row_length, py::arg("stream"))
      .def("pin", &PageTable::pin, py::arg("streams"), py::arg("num_tokens"))
      .def("unpin", &PageTable::unpin, py::arg("reader"))
      .def("copy_rows", &copy_rows, py::arg("streams"), py::arg("table"),
           "Rows of several streams into an int32 array [streams, pages].")
      .def("positions", &positions, py::arg("streams"), py::arg("tokens"),
           "Where ranges of tokens stand, int64 [..., streams, ranges, 2], as int32 of the same shape.");
}
