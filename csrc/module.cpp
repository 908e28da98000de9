// The pybind11 module selfforcing_ext._C: what is no tensor op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "geometry/page_table.h"
#include "simd/isa.h"

namespace py = pybind11;
using selfforcing::PageTable;

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

  py::class_<PageTable>(m, "PageTable",
                        "Which pages of a pool hold which tokens of which stream (csrc/geometry/page_table.h).")
      .def(py::init<int64_t, int64_t, int64_t>(), py::arg("num_streams"), py::arg("page_size"), py::arg("sink_tokens"))
      .def_property_readonly("num_streams", &PageTable::num_streams)
      .def_property_readonly("page_size", &PageTable::page_size)
      .def_property_readonly("num_pages", &PageTable::num_pages)
      .def_property_readonly("num_free_pages", &PageTable::num_free_pages)
      .def("add_pages", &PageTable::add_pages, py::arg("count"))
      .def("pages_needed", &PageTable::pages_needed, py::arg("stream"), py::arg("num_tokens"))
      .def("append", &PageTable::append, py::arg("stream"), py::arg("num_tokens"))
      .def("releasable", &PageTable::releasable, py::arg("stream"), py::arg("first_visible"))
      .def("release_before", &PageTable::release_before, py::arg("stream"), py::arg("first_visible"))
      .def("clear", &PageTable::clear)
      .def("num_tokens", &PageTable::num_tokens, py::arg("stream"))
      .def("pages", &PageTable::pages, py::arg("stream"))
      .def("position", &PageTable::position, py::arg("stream"), py::arg("token"))
      .def("spans", &PageTable::spans, py::arg("stream"), py::arg("first_visible"), py::arg("num_tokens"))
      .def("pin", &PageTable::pin, py::arg("pages"))
      .def("unpin", &PageTable::unpin, py::arg("pages"));
}
