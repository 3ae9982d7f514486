// IoEngine as Python sees it. Arguments are checked here; everything below works on raw pointers and trusts them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "bindings.hpp"
#include "io_queue.hpp"

namespace py = pybind11;

namespace fuyou {

namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kLargestPiece = uint64_t{1} << 30;  // one transfer of the kernel moves at most 2 GiB less a page
constexpr double kLongestWait_s = 1e8;                 // keeps now() + wait inside the clock's range
constexpr double kLastDrain_s = 300.0;                 // of an engine that nobody closed
constexpr double kSignalSlice_s = 0.2;                 // how often a waiting main thread looks for Ctrl-C

IoQueue::Clock::time_point after(double seconds) {
    const double bounded = std::isnan(seconds) ? 0.0 : std::clamp(seconds, 0.0, kLongestWait_s);
    return IoQueue::Clock::now() +
           std::chrono::duration_cast<IoQueue::Clock::duration>(std::chrono::duration<double>(bounded));
}

// Calls `wait_until(deadline)` without the GIL, in slices between which Python's signal handlers run.
template <typename Wait>
bool wait_in_slices(double timeout_s, Wait wait_until) {
    const auto deadline = after(timeout_s);
    for (;;) {
        bool ended = false;
        {
            py::gil_scoped_release unlocked;
            ended = wait_until(std::min(deadline, after(kSignalSlice_s)));
        }
        if (ended) return true;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (IoQueue::Clock::now() >= deadline) return false;
    }
}

// In a forked child a lock may be held for ever by a thread that does not exist there: this comes before any lock.
void check_process(pid_t owner) {
    if (::getpid() != owner) {
        throw IoStateError{"this I/O engine belongs to process " + std::to_string(owner) +
                           ", not to its forked child " + std::to_string(::getpid())};
    }
}

// One operation as its ticket holds it. It outlives its engine.
class IoOperation {
  public:
    IoOperation(std::shared_ptr<Op> op, pid_t owner) : op_(std::move(op)), owner_(owner) {}

    uint64_t id() const { return op_->id; }

    bool done() const { return op_->done(); }

    bool wait(double timeout_s) {
        check_process(owner_);
        return wait_in_slices(timeout_s, [&](auto deadline) { return op_->wait(deadline); });
    }

    // Of one that is done: when its first piece went to the backend, and when its last one came back, on Python's
    // time.perf_counter(), which is this clock on Linux.
    std::pair<double, double> times() const {
        if (!op_->done()) throw IoStateError{"an operation that has not ended has no times"};
        const auto seconds = [](auto point) { return std::chrono::duration<double>(point.time_since_epoch()).count(); };
        return {seconds(op_->began), seconds(op_->ended)};
    }

  private:
    std::shared_ptr<Op> op_;
    pid_t owner_;
};

class IoEngine {
  public:
    IoEngine(const std::string& backend, int64_t queue_depth, int64_t piece_bytes, int64_t burst_bytes)
        : pid_(::getpid()) {
        if (queue_depth < 1 || queue_depth > 4096) throw py::value_error("queue_depth must be 1 to 4096");
        if (piece_bytes < 1 || piece_bytes % static_cast<int64_t>(kPage) != 0 ||
            piece_bytes > static_cast<int64_t>(kLargestPiece)) {
            throw py::value_error("piece_bytes must be a multiple of 4096, at most 1 GiB");
        }
        if (burst_bytes < 0) throw py::value_error("burst_bytes must not be negative");
        queue_ = std::make_unique<IoQueue>(static_cast<uint64_t>(piece_bytes), static_cast<uint64_t>(burst_bytes));
        if (backend == "io_uring") {
            backend_ = make_uring_backend(*queue_, static_cast<unsigned>(queue_depth));
        } else if (backend == "threads") {
            if (queue_depth > 256) throw py::value_error("queue_depth must be at most 256: it is one thread for each");
            backend_ = make_thread_backend(*queue_, static_cast<unsigned>(queue_depth));
        } else {
            throw py::value_error("unknown backend '" + backend + "': io_uring or threads");
        }
    }

    ~IoEngine() {
        if (::getpid() != pid_) {  // the threads do not exist here: there is nobody to join
            leak();
            return;
        }
        if (backend_ == nullptr) return;
        py::gil_scoped_release unlocked;
        queue_->refuse_new();
        if (queue_->drain(after(gave_up_ ? 0.0 : kLastDrain_s))) {
            backend_->stop();
        } else {  // what the kernel still works with must outlive us: rather leak than free it under I/O
            leak();
        }
    }

    int add_file(int fd, const std::string& path, int64_t alignment_bytes) {
        check_usable();
        if (fd < 0) throw py::value_error("fd must not be negative");
        if (alignment_bytes < 1) throw py::value_error("alignment_bytes must be at least 1");
        const std::shared_ptr<Backend> backend = backend_;
        auto file = queue_->add_file(fd, path, static_cast<uint64_t>(alignment_bytes));
        py::gil_scoped_release unlocked;  // it waits for the ring's thread, which may be busy with a slow drive
        backend->file_added(*file);
        return file->id;
    }

    bool remove_file(int file, double timeout_s) {
        check_usable();
        const std::shared_ptr<Backend> backend = backend_;  // close() in another thread may drop its own meanwhile
        std::shared_ptr<IoFile> removed;
        wait_in_slices(timeout_s, [&](auto deadline) {
            removed = queue_->remove_file(file, deadline);
            return removed != nullptr;
        });
        if (removed == nullptr) return false;
        py::gil_scoped_release unlocked;
        backend->file_removed(*removed);
        return true;
    }

    bool register_buffer(uintptr_t address, int64_t nbytes) {
        check_usable();
        check_range(address, nbytes);
        const std::shared_ptr<Backend> backend = backend_;
        py::gil_scoped_release unlocked;
        return backend->register_buffer(address, static_cast<uint64_t>(nbytes));
    }

    void unregister_buffer(uintptr_t address) {
        check_usable();
        const std::shared_ptr<Backend> backend = backend_;
        py::gil_scoped_release unlocked;
        backend->unregister_buffer(address);
    }

    IoOperation transfer(Kind kind, int file, int64_t offset, uintptr_t address, int64_t nbytes) {
        check_usable();
        check_range(address, nbytes);
        if (offset < 0) throw py::value_error("offset must not be negative");
        if (nbytes > std::numeric_limits<int64_t>::max() - offset) throw py::value_error("offset + nbytes overflows");
        return submit(kind, file, static_cast<uint64_t>(offset), reinterpret_cast<char*>(address),
                      static_cast<uint64_t>(nbytes));
    }

    IoOperation fsync(int file) {
        check_usable();
        return submit(Kind::flush, file, 0, nullptr, 0);
    }

    std::vector<uint64_t> take_finished() {
        check_process();
        return queue_->take_finished();
    }

    std::vector<std::string> in_flight() {
        check_process();
        return queue_->in_flight();
    }

    std::string note() {
        check_process();
        return note_after_close_.empty() && backend_ != nullptr ? backend_->note() : note_after_close_;
    }

    bool close(double timeout_s) {
        check_process();
        queue_->refuse_new();
        gave_up_ = !wait_in_slices(timeout_s, [&](auto deadline) { return queue_->drain(deadline); });
        if (gave_up_) return false;
        std::shared_ptr<Backend> backend = std::move(backend_);  // under the GIL: two callers cannot both have it
        if (backend != nullptr) {
            note_after_close_ = backend->note();
            py::gil_scoped_release unlocked;
            backend->stop();
            backend.reset();
        }
        return true;
    }

  private:
    void check_process() const { fuyou::check_process(pid_); }

    void check_usable() const {
        check_process();
        if (backend_ == nullptr) throw IoStateError{"the I/O engine is closed"};
    }

    static void check_range(uintptr_t address, int64_t nbytes) {
        if (address == 0) throw py::value_error("address must not be null");
        if (nbytes <= 0) throw py::value_error("nbytes must be positive");
        if (static_cast<uint64_t>(nbytes) > std::numeric_limits<uintptr_t>::max() - address) {
            throw py::value_error("address + nbytes overflows");
        }
    }

    IoOperation submit(Kind kind, int file, uint64_t offset, char* address, uint64_t nbytes) {
        std::shared_ptr<Op> op = queue_->submit(kind, file, offset, address, nbytes);
        backend_->wake();
        return IoOperation(std::move(op), pid_);
    }

    void leak() {
        new std::shared_ptr<Backend>(std::move(backend_));
        (void)queue_.release();
    }

    const pid_t pid_;
    std::unique_ptr<IoQueue> queue_;
    std::shared_ptr<Backend> backend_;  // null once closed
    std::string note_after_close_;
    bool gave_up_ = false;  // the last close() passed its deadline: whoever drops us has waited enough
};

}  // namespace

}  // namespace fuyou

void bind_io(py::module_& module) {
    using namespace fuyou;

    // Kept for the life of the process, as the types of any extension module are.
    static PyObject* io_error = PyErr_NewException("fuyou._native.IoError", PyExc_OSError, nullptr);
    static PyObject* state_error = PyErr_NewException("fuyou._native.IoStateError", PyExc_RuntimeError, nullptr);
    if (io_error == nullptr || state_error == nullptr) throw py::error_already_set();
    module.add_object("IoError", io_error);
    module.add_object("IoStateError", state_error);
    py::register_local_exception_translator([](std::exception_ptr pending) {
        try {
            if (pending) std::rethrow_exception(pending);
        } catch (const IoError& error) {
            PyErr_SetObject(io_error, py::make_tuple(error.error, error.text).ptr());
        } catch (const IoStateError& error) {
            PyErr_SetString(state_error, error.text.c_str());
        }
    });

    py::class_<IoOperation>(module, "IoOperation")
        .def_property_readonly("id", &IoOperation::id)
        .def("done", &IoOperation::done)
        .def("times", &IoOperation::times)
        .def("wait", &IoOperation::wait, py::arg("timeout_s") = 300.0);

    py::class_<IoEngine>(module, "IoEngine")
        .def(py::init<const std::string&, int64_t, int64_t, int64_t>(), py::arg("backend"), py::arg("queue_depth"),
             py::arg("piece_bytes"), py::arg("burst_bytes"))
        .def("add_file", &IoEngine::add_file, py::arg("fd"), py::arg("path"), py::arg("alignment_bytes") = 1)
        .def("remove_file", &IoEngine::remove_file, py::arg("file"), py::arg("timeout_s") = 300.0)
        .def("register_buffer", &IoEngine::register_buffer, py::arg("address"), py::arg("nbytes"))
        .def("unregister_buffer", &IoEngine::unregister_buffer, py::arg("address"))
        .def(
            "read",
            [](IoEngine& engine, int file, int64_t offset, uintptr_t address, int64_t nbytes) {
                return engine.transfer(Kind::read, file, offset, address, nbytes);
            },
            py::arg("file"), py::arg("offset"), py::arg("address"), py::arg("nbytes"))
        .def(
            "write",
            [](IoEngine& engine, int file, int64_t offset, uintptr_t address, int64_t nbytes) {
                return engine.transfer(Kind::write, file, offset, address, nbytes);
            },
            py::arg("file"), py::arg("offset"), py::arg("address"), py::arg("nbytes"))
        .def("fsync", &IoEngine::fsync, py::arg("file"))
        .def("take_finished", &IoEngine::take_finished)
        .def("in_flight", &IoEngine::in_flight)
        .def("note", &IoEngine::note)
        .def("close", &IoEngine::close, py::arg("timeout_s") = 300.0);
}
