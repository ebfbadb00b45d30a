"""A hub on 127.0.0.1: the Hugging Face Hub's HTTP API in memory, with a log and with faults."""

from hub_server.backend import Hub as Hub
from hub_server.backend import real_hub as real_hub
from hub_server.backend import set_environment as set_environment
from hub_server.server import LoopbackHub as LoopbackHub
