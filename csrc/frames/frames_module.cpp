// Python module mplug2._frames: numpy arrays in, numpy arrays out, the lock of the interpreter released while pixels
// move.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "frames.h"

namespace py = pybind11;
using Array = py::array_t<uint8_t>;

namespace {

std::string shape_of(const Array& a) {
  std::string text;
  for (py::ssize_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "[") + std::to_string(a.shape(i));
  return text + "]";
}

void check_picture(const Array& a, const char* name) {
  if (a.ndim() != 3 || a.shape(2) != mplug2::frames::kChannels || a.size() == 0 || a.strides(2) != 1 ||
      a.strides(1) != mplug2::frames::kChannels)
    throw std::invalid_argument("resize: " + std::string(name) + " must be uint8 [H, W, 3] with packed pixels, got " +
                                shape_of(a));
}

void resize(const Array& picture, Array out, const std::string& mode) {
  check_picture(picture, "picture");
  check_picture(out, "out");
  if (out.strides(0) != mplug2::frames::kChannels * out.shape(1))
    throw std::invalid_argument("resize: out must be contiguous, got a row stride of " +
                                std::to_string(out.strides(0)));
  const mplug2::frames::Picture in{picture.data(), picture.shape(0), picture.shape(1), picture.strides(0)};
  const mplug2::frames::Output to{out.mutable_data(), out.shape(0), out.shape(1)};
  if (mode != "nearest" && mode != "area")
    throw std::invalid_argument("resize: mode must be nearest or area, got " + mode);
  py::gil_scoped_release release;
  if (mode == "nearest")
    mplug2::frames::resize_nearest(in, to);
  else
    mplug2::frames::resize_area(in, to);
}

}  // namespace

PYBIND11_MODULE(_frames, m) {
  m.doc() = "Host-side preparation of decoded pictures.";
  // noconvert: a copy of `out` made to fit a dtype would be filled and thrown away.
  m.def("resize", &resize, py::arg("picture").noconvert(), py::arg("out").noconvert(), py::arg("mode"),
        "Resize picture, uint8 [H, W, 3] with any row stride, into out, uint8 [h, w, 3] contiguous; mode nearest or "
        "area.");
}
