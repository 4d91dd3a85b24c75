// Rows of tensors in the caller's memory: conversion between element types.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/data_type.h"
#include "worker/group.h"

namespace longspan {

// `count` elements; a copy where the types are equal.
void convert_elements(DataType from, const void* source, DataType to, void* target, size_t count);

// Keys and values of consecutive tokens, row-major: keys [rows][G][D], values [rows][G][E].
struct TokenRows {
  DataType dtype = DataType::kFloat32;
  const std::byte* keys = nullptr;
  const std::byte* values = nullptr;
};

}  // namespace longspan
