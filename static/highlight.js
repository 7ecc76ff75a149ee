// A little colour for code: comments, strings, numbers and the commonest keywords. One pass.

import { span } from "./dom.js";

const HASH = "python py sh bash shell zsh console yaml yml toml ruby rb r dockerfile make ini perl";
const SLASH =
  "javascript js jsx typescript ts tsx java c cpp c++ cs csharp go rust rs swift kotlin" +
  " php css scss json scala dart";
const DASH = "sql lua haskell";
const COMMENTS = new Map([
  ...HASH.split(" ").map((name) => [name, "#.*"]),
  ...SLASH.split(" ").map((name) => [name, String.raw`\/\/.*|\/\*[^]*?(?:\*\/|$)`]),
  ...DASH.split(" ").map((name) => [name, "--.*"]),
]);
const KEYWORDS = `abstract and as async await break case catch class const continue def default del
  delete do done elif else enum except export extends false False fi finally fn for from func
  function if impl implements import in instanceof interface is lambda let match mod mut new nil
  None not null or package pass private protected pub public raise return select self static struct
  super switch then this throw trait true True try type typeof use using var void where while with
  yield SELECT FROM WHERE INSERT INTO VALUES UPDATE SET DELETE CREATE TABLE INDEX JOIN LEFT ON AND
  OR NOT NULL PRIMARY KEY ORDER BY GROUP LIMIT AS`
  .split(/\s+/)
  .join("|");
const STRING =
  String.raw`"""[^]*?(?:"""|$)|"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?|` + "`[^`]*`?";
const GREATEST = 20_000; // characters: a long text is drawn anew with each of its tokens

// Returns the nodes that show `text`; together they have exactly this text.
export function highlight(text, language) {
  const comment = COMMENTS.get(language);
  if (!comment || text.length > GREATEST) return [text];
  const token = new RegExp(
    `(?<comment>${comment})|(?<string>${STRING})` +
      `|(?<number>\\b\\d[\\w.]*)|(?<keyword>\\b(?:${KEYWORDS})\\b)|[A-Za-z_]\\w*`,
    "g",
  );
  const nodes = [];
  let at = 0;
  for (const { 0: whole, index, groups } of text.matchAll(token)) {
    const [kind] = Object.entries(groups).find(([, found]) => found !== undefined) ?? [];
    if (!kind) continue;
    nodes.push(text.slice(at, index), span(whole, `code-${kind}`));
    at = index + whole.length;
  }
  return [...nodes, text.slice(at)];
}
