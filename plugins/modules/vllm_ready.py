#!/usr/bin/python
"""Waits until a vLLM server answers a real completion, and no longer than it can still hope for one."""

from __future__ import annotations

import http.client
import json
import subprocess
import time
import urllib.error
import urllib.request
from collections import deque
from pathlib import Path

from ansible.module_utils.api_keys import read_keys
from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: vllm_ready
short_description: Wait until a vLLM server answers a real completion
description:
  - Asks for a completion of a few tokens until one comes. A listening port or C(/health) proves nothing; a
    completion does.
  - Gives up at once when the service manager has given up, or when the server that answers refuses the key or
    the model.
  - Reads the API key from the service's own environment file on the host, so that it is never an argument of
    a task.
options:
  url:
    description: Base address of the server, as C(http://127.0.0.1:8000).
    type: str
    required: true
  model:
    description: Served model name.
    type: str
    required: true
  env_file:
    description: File of KEY=VALUE lines that holds VLLM_API_KEY.
    type: path
    required: true
  timeout_s:
    description: Longest wait, in seconds.
    type: int
    required: true
  state_command:
    description: Command that prints the service's state.
    type: list
    elements: str
    required: true
  failed_states:
    description: Words in the output of O(state_command) that mean that the service manager has given up.
    type: list
    elements: str
    required: true
  log_file:
    description: The server's log; its end is returned on failure.
    type: path
    required: true
  log_lines:
    description: How many lines of the log are returned on failure.
    type: int
    default: 40
author: vllm-lowmem
"""

RETURN = r"""
seconds:
  description: How long the completion was waited for.
  returned: always
  type: float
log_tail:
  description: The last lines of the log.
  returned: failure
  type: list
"""

PAUSE_S = 1.0
REQUEST_TIMEOUT_S = 60
# These do not go away by waiting: the server runs and says no.
REFUSALS = {
    401: (
        "the server on that port does not take this deployment's API key; is it another service, or one that"
        " was not restarted?"
    ),
    404: "the server on that port does not serve this model",
}


class Refused(Exception):
    """The server answers and will never give this completion."""


def api_key(env_file: str) -> str:
    keys = read_keys(Path(env_file).read_text())
    if "" not in keys:
        raise Refused(f"{env_file} holds no VLLM_API_KEY")
    return keys[""]


def completion(url: str, model: str, key: str) -> None:
    """Returns after a completion of at least one token. Raises OSError where there is none yet, Refused where
    there will be none.
    """
    body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 4, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url}/v1/completions", data=body, headers=headers)  # noqa: S310 - the address is the plan's own
    try:
        # no proxy: the server is on this host
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            request, timeout=REQUEST_TIMEOUT_S
        ) as answer:
            tokens = json.load(answer)["usage"]["completion_tokens"]
    except urllib.error.HTTPError as error:
        if error.code in REFUSALS:
            raise Refused(f"{url} answers {error.code}: {REFUSALS[error.code]}") from error
        raise
    except (ValueError, KeyError, http.client.HTTPException) as error:
        raise OSError(f"{url} answers, but not as vLLM does") from error
    if tokens < 1:
        raise OSError(f"{url} answers with a completion of no tokens")


def state(command: list) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout.strip()


def tail(path: str, lines: int) -> list:
    try:
        with Path(path).open(errors="replace") as log:
            return [line.rstrip("\n") for line in deque(log, maxlen=lines)]
    except OSError as error:
        return [str(error)]


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "model": {"type": "str", "required": True},
            "env_file": {"type": "path", "required": True, "no_log": False},
            "timeout_s": {"type": "int", "required": True},
            "state_command": {"type": "list", "elements": "str", "required": True},
            "failed_states": {"type": "list", "elements": "str", "required": True},
            "log_file": {"type": "path", "required": True},
            "log_lines": {"type": "int", "default": 40},
        },
        supports_check_mode=True,
    )
    wanted = module.params
    if module.check_mode:
        module.exit_json(changed=False, skipped=True, msg="a completion is not waited for in check mode")

    began = time.monotonic()

    def give_up(reason: str) -> None:
        module.fail_json(
            msg=f"vLLM does not answer a completion: {reason}",
            seconds=round(time.monotonic() - began, 1),
            log_tail=tail(wanted["log_file"], wanted["log_lines"]),
        )

    last = ""
    while time.monotonic() - began < wanted["timeout_s"]:
        try:
            completion(wanted["url"], wanted["model"], api_key(wanted["env_file"]))
        except Refused as error:
            give_up(str(error))
        except OSError as error:
            last = str(error)
        else:
            module.exit_json(changed=False, seconds=round(time.monotonic() - began, 1))
        now = state(wanted["state_command"])
        if any(word in now.split() for word in wanted["failed_states"]):
            give_up(f"the service manager has given up on it ({now})")
        time.sleep(PAUSE_S)
    give_up(f"waited {wanted['timeout_s']} s, the last attempt ended with: {last}")


if __name__ == "__main__":
    main()
