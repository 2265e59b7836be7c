#!/bin/sh
exec /usr/bin/python3 /opt/vllm-lowmem/etc/engine.py
