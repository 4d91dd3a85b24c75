// A context as the gRPC threads of a worker see it: what never changes, and when it was last used.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <utility>

#include "worker/group.h"

namespace longspan {

class OpenContext {
 public:
  OpenContext(std::string id, ContextHandle handle, ContextShape shape, size_t default_method)
      : id_(std::move(id)),
        handle_(handle),
        shape_(std::move(shape)),
        default_method_(default_method) {
    touch();
  }

  const std::string& id() const { return id_; }
  ContextHandle handle() const { return handle_; }
  const ContextShape& shape() const { return shape_; }
  size_t default_method() const { return default_method_; }
  // The method of that name, or the default for an empty one; null when the context has none such.
  const Method* find_method(const std::string& name) const {
    if (name.empty()) {
      return &shape_.methods[default_method_];
    }
    for (const Method& method : shape_.methods) {
      if (method.name == name) {
        return &method;
      }
    }
    return nullptr;
  }

  void touch() const {
    last_used_.store(std::chrono::steady_clock::now(), std::memory_order_relaxed);
  }
  std::chrono::steady_clock::time_point last_used() const {
    return last_used_.load(std::memory_order_relaxed);
  }

 private:
  std::string id_;
  ContextHandle handle_;
  ContextShape shape_;
  size_t default_method_;
  mutable std::atomic<std::chrono::steady_clock::time_point> last_used_;
};

using ContextRef = std::shared_ptr<const OpenContext>;

}  // namespace longspan
