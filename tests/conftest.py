def pytest_collection_modifyitems(items):
    "The file that takes longest starts first, so that two processes end at about the same time."
    items.sort(key=lambda item: item.path.name != 'test_vision.py')
