import torch
from chatting import save
from typer.testing import CliRunner

from dybit.cli import app


def talk(folder, text, *options):
    return CliRunner().invoke(app, ["chat", str(folder), "--max-tokens", "4", *options], input=text)


def test_answers_are_those_of_the_model(tmp_path):
    model = save(tmp_path)
    result = talk(tmp_path, "w3 w4\nw5\n\nw6\n")
    assert result.exit_code == 0, result.stderr
    first, second = result.stdout.strip().splitlines()[:2]
    words = ["<end>", "<unknown>", "user", "assistant", *(f"w{i}" for i in range(28))]

    def answer(prompt):
        ids = torch.tensor([[words.index(word) for word in prompt.split()]])
        with torch.no_grad():
            made = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        return " ".join(words[i] for i in made[0, ids.shape[1] :] if i)

    assert first.split() == answer("user w3 w4 assistant").split()
    assert second.split() == answer(f"user w3 w4 assistant {first} user w5 assistant").split()


def test_the_end_of_the_input_ends_the_conversation(tmp_path):
    save(tmp_path)
    assert talk(tmp_path, "w3", "--temperature", "0.5", "--threads", "1").exit_code == 0


def test_tokenizers_without_a_template(tmp_path):
    save(tmp_path, None)
    result = talk(tmp_path, "w3\n")
    assert result.exit_code == 2 and "has no chat template" in result.stderr


def test_other_folders(tmp_path):
    result = talk(tmp_path / "missing", "")
    assert result.exit_code == 2 and "missing" in result.stderr
