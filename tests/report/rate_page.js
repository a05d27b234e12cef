// Runs the rating page's script (its path is the argument) in a page of two questions that two
// people rate one after the other, and prints what each of them found.
const { readFileSync } = require("fs");
const heard = new Map();
const part = (more) => ({
  addEventListener(kind, hear) { heard.set(this, { ...heard.get(this), [kind]: hear }); },
  ...more,
});
const fire = (on, kind) => heard.get(on)[kind]({ preventDefault() {} });
const choices = [["s1 better", "1"], ["s1 better", "2"], ["s1 mistake_1", "yes"]].map(
  ([name, value]) => part({ name, value, checked: false }),
);
const form = part({
  dataset: { name: "sheet", columns: "mistake_1 better" },
  querySelectorAll: () => choices,
});
const [rater, clear] = [part({ value: "", focus() {} }), part({})];
const [output, link, stored, files] = [{}, { click() {} }, new Map(), []];
const named = { form, output, "#rater": rater, "#clear": clear };
globalThis.document = {
  querySelector: (what) => named[what],
  querySelectorAll: (what) => (what === "article" ? [{ id: "s1" }] : [1, 2]),
  createElement: () => link,
};
globalThis.localStorage = {
  getItem: (key) => stored.get(key) ?? null,
  setItem: (key, value) => stored.set(key, value),
  removeItem: (key) => stored.delete(key),
};
globalThis.confirm = () => true;
URL.createObjectURL = (file) => files.push(file);

const chosen = () => choices.filter((c) => c.checked).map((c) => c.name + " " + c.value);
function write(name) {
  rater.value = name;
  fire(rater, "input");
  return chosen();
}
function choose(place) {
  choices[place].checked = true;
  fire(choices[place], "change");
}

async function main() {
  new Function(readFileSync(process.argv[2], "utf8"))();
  const told = { locked: choices.every((c) => c.disabled) };
  fire(form, "submit");
  told.unnamed = files.length;
  write("小明");
  choose(1);
  choose(2);
  told.second = write("bob");
  choose(0);
  told.first = write("小明 ");
  fire(form, "submit");
  told.file = link.download;
  told.rows = await files[0].text();
  fire(clear, "click");
  told.cleared = chosen();
  told.other = write("bob");
  told.stored = stored.size;
  console.log(JSON.stringify(told));
}
main();
