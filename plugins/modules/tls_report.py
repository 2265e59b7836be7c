#!/usr/bin/python
"""Whether a certificate and its key can be served; reads only."""

from __future__ import annotations

import calendar
import ipaddress
import re
import ssl
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: tls_report
short_description: Judge a TLS certificate and its private key on this host
description:
  - Reads both files, lets OpenSSL load them together as a server does, and says in a few words what is wrong
    with them. Changes nothing.
options:
  certificate:
    description: File with the certificate, and those between it and its root, in PEM.
    type: path
    required: true
  key:
    description: File with the private key in PEM, without a passphrase.
    type: path
    required: true
author: vllm-lowmem
"""

RETURN = r"""
problem: {description: Empty where they can be served, returned: always, type: str}
subject: {description: Which of V(certificate) and V(key) the problem is of, returned: always, type: str}
not_after: {description: "End of validity as ISO 8601, UTC; empty where it cannot be read",
  returned: always, type: str}
days_left: {description: "Whole days until then; negative once it is past", returned: always, type: int}
names: {description: Names and addresses that it is for, returned: always, type: list}
"""

KNOWN = {
    "KEY_VALUES_MISMATCH": "does not belong to the certificate",
    "BAD_DECRYPT": "is locked with a passphrase, which a server cannot type",
    "BAD_PASSWORD_READ": "is locked with a passphrase, which a server cannot type",
}


def refuse_passphrase() -> str:
    raise ValueError("passphrase")


def key_problem(certificate: str, key: str) -> str:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=refuse_passphrase)
    except ssl.SSLError as error:
        return KNOWN.get(error.reason, "is no private key in PEM that OpenSSL reads")
    except ValueError:
        return KNOWN["BAD_DECRYPT"]
    return ""


def plain(name: str) -> str:
    """OpenSSL spells an IPv6 address out."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name


def readable(path: str) -> str:
    try:
        with Path(path).open("rb"):
            return ""
    except FileNotFoundError:
        return "is no file on this host"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "certificate": {"type": "path", "required": True},
            "key": {"type": "path", "required": True, "no_log": False},
        },
        supports_check_mode=True,
    )
    certificate, key = module.params["certificate"], module.params["key"]
    result = {"changed": False, "problem": "", "subject": "", "not_after": "", "days_left": 0, "names": []}

    def say(subject: str, problem: str) -> None:
        module.exit_json(**{**result, "subject": subject, "problem": problem})

    for subject, path in (("certificate", certificate), ("key", key)):
        if readable(path):
            say(subject, readable(path))
    openssl = module.get_bin_path("openssl", required=True)
    code, text, _ = module.run_command(
        [openssl, "x509", "-in", certificate, "-noout", "-enddate", "-ext", "subjectAltName"]
    )
    if code:
        say("certificate", "is no certificate in PEM that OpenSSL reads")
    end = re.search(r"notAfter=(.+) GMT", text)
    if end:
        moment = time.strptime(" ".join(end.group(1).split()), "%b %d %H:%M:%S %Y")
        result["not_after"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", moment)
        result["days_left"] = int((calendar.timegm(moment) - time.time()) // 86400)
    result["names"] = [plain(name) for name in re.findall(r"(?:DNS|IP Address):([^,\s]+)", text)]
    problem = key_problem(certificate, key)
    if problem:
        say("key", problem)
    if result["days_left"] < 0:
        say("certificate", f"has expired on {result['not_after']}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
