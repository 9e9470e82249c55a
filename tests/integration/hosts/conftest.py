from tests.hosts.fixtures import *  # noqa: F403 - that is how a conftest takes fixtures
