"""What workers are given in tests: functions that answer, fail, hang and die."""

import os
import time

from kinoflow.configs.errors import UserError


def answer(name: str) -> str:
    return name.upper()


def refuse(name: str) -> str:
    raise UserError(f"{name}: is bad")


def hang(name: str) -> str:
    time.sleep(1000)
    return name


def die(name: str) -> str:
    os._exit(9)
    return name
