"""A task of your own as a class: its questions, worked examples and verifier; then judge, diagnose and evaluate."""

import cotree
from cotree.tasks.base import split_of


class Doubling(cotree.Task):
    """Twice a number."""

    name = "doubling"
    description = "twice a number"
    prompt_version = "doubling/1"

    def questions(self, split=None, limit=None):
        asked = []
        for number in range(10, 60):
            prompt = {"role": "user", "content": f"What is twice {number}? Put the final answer in \\boxed{{}}."}
            asked.append(cotree.Question(str(number), self.name, (prompt,), str(2 * number)))
        return [question for question in asked if split in (None, split_of(question.id))][:limit]

    def worked_examples(self, question):
        steps = {"sub_task": "I double the number.", "thinking": "3 + 3 = 6"}
        return [cotree.WorkedExample("What is twice 3?", steps, "6")]


task = Doubling()
question = task.questions("test", 1)[0]
for reply in (f"It is \\boxed{{{question.gold}}}.", "It is \\boxed{7}.", "Wait, " * 300):
    verdict, diagnosis = task.judge(question, reply), cotree.diagnose(reply)
    print(f"{verdict.kind:10} answer {verdict.answer}  loop: {diagnosis.loop}")
