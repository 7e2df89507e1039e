from command_line import invoke


def test_doctor():
    text = invoke("doctor").stdout
    assert all(word in text for word in ("torch", "threads", "instruction set", "extra [plot]", "model smollm2"))
