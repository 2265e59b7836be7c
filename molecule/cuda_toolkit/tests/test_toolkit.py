"""nvcc of the version asked for, and no driver with it."""


def test_nvcc_is_the_version_asked_for(host):
    assert "release 13.0, V13.0.88" in host.check_output("/usr/local/cuda-13.0/bin/nvcc")
    assert host.package("cuda-nvcc-13-0").version == "13.0.88-1"
    assert host.package("cuda-cudart-dev-13-0").is_installed
    assert not host.package("cuda-nvcc-13-1").is_installed


def test_a_c_and_a_cxx_compiler_work(host):
    source = "int main(void) { return 42; }"
    host.check_output(
        f"echo '{source}' >/tmp/answer.c && gcc -o /tmp/answer /tmp/answer.c && g++ -x c++ -o /tmp/answer++"
        " /tmp/answer.c"
    )
    assert host.run("/tmp/answer").rc == 42
    assert host.run("/tmp/answer++").rc == 42


def test_the_headers_of_python_are_there(host):
    """Triton's launchers include Python.h."""
    folder = host.check_output("python3 -c 'import sysconfig; print(sysconfig.get_path(\"include\"))'")
    assert host.file(f"{folder}/Python.h").exists


def test_no_driver_came_along(host):
    for name in ("nvidia-open", "nvidia-driver-cuda", "libcuda1", "nvidia-kernel-open-dkms"):
        assert not host.package(name).is_installed


def test_a_driver_would_have_come_with_the_package_of_everything(host):
    """What the role keeps away from; when this fails, the stub no longer plays NVIDIA's repository."""
    assert "Inst nvidia-driver-cuda" in host.check_output("apt-get --simulate --quiet=2 install cuda-13-0")
