// The page of `vqr1 serve`: sends pictures to /v1/rank and shows what comes back. All numbers are the server's.
const EXAMPLES = ["lake.jpg", "lake_blurred.jpg", "lake_crushed.jpg", "lake_enlarged.jpg"];
const BIN = 10; // of the 401 scores: bars are a tenth wide
const byId = (id) => document.getElementById(id);
let pictures = []; // {file, url}
let limit = 32;

function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  Object.assign(node, properties);
  node.append(...children); // text stays text, whatever a file name or a reply holds
  return node;
}

function svgElement(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function showProblem(message) {
  byId("problem").hidden = !message;
  byId("problem").textContent = message || "";
}

async function post(path, files) {
  const body = new FormData();
  for (const file of files) body.append("images", file);
  const key = byId("key").value;
  const response = await fetch(path, { method: "POST", body, headers: key ? { Authorization: `Bearer ${key}` } : {} });
  const answer = await response.json();
  // 422 with results: none of the pictures can be scored, and each says why.
  if (!response.ok && !answer.results) throw new Error(answer.error?.message || `the server answered ${response.status}`);
  return answer;
}

function drawDistribution(result) {
  const [width, height, base] = [260, 84, 66];
  const x = (score) => 10 + ((score - 1) / 4) * (width - 20);
  const svg = svgElement("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const [low, high] = result.interval;
  svg.append(svgElement("title", {}, `95% of the distribution lies between ${low.toFixed(2)} and ${high.toFixed(2)}`));
  svg.append(svgElement("rect", { class: "band", x: x(low), y: 4, width: Math.max(1, x(high) - x(low)), height: base - 4 }));
  const bins = new Array(Math.ceil(result.probabilities.length / BIN)).fill(0);
  const scores = new Array(bins.length).fill(0);
  // Bins are centred on 1.0, 1.1, ... 5.0; the first and the last hold half as many scores, so bars show the mean of each.
  result.probabilities.forEach((p, i) => { bins[Math.round(i / BIN)] += p; scores[Math.round(i / BIN)] += 1; });
  bins.forEach((p, i) => { bins[i] = p / scores[i]; });
  const top = Math.max(...bins);
  bins.forEach((p, i) => {
    const tall = (p / top) * (base - 8);
    if (tall > 0.2) svg.append(svgElement("rect", { class: "bar", x: x(1 + i / 10) - 2.4, y: base - tall, width: 4.8, height: tall }));
  });
  svg.append(svgElement("line", { class: "axis", x1: x(1), x2: x(5), y1: base, y2: base }));
  svg.append(svgElement("line", { class: "mean", x1: x(result.score), x2: x(result.score), y1: 2, y2: base + 3 }));
  for (let score = 1; score <= 5; score++) svg.append(svgElement("text", { x: x(score), y: base + 14 }, score));
  return svg;
}

function card(place, result, picture) {
  const words = element("div", {}, element("div", { className: "name", textContent: result.name }));
  const image = element("img", { alt: "" });
  image.addEventListener("error", () => { image.style.visibility = "hidden"; }); // no picture, or one no browser shows
  image.src = picture.url;
  const node = element("li", { className: "card" }, image, words);
  if (result.error) {
    words.append(element("div", { className: "error", textContent: result.error }));
    return node;
  }
  const rank = `${place.rank}.${place.tied ? " (tied)" : ""} `;
  words.append(element("div", { className: "score" }, element("span", { className: "rank", textContent: rank }), result.score.toFixed(2)));
  const [low, high] = result.interval;
  words.append(element("small", { textContent: `± ${result.std.toFixed(2)}; 95% between ${low.toFixed(2)} and ${high.toFixed(2)}` }));
  if (!result.reliable) {
    const warning = `Not reliable: ${percent(result.coverage)} of the model's answers would be a score, and ` +
      `${percent(result.tag_probability)} of its replies would open with the answer tag.`;
    words.append(element("small", { className: "error", textContent: warning }));
  }
  const button = element("button", { type: "button", textContent: "Reasoning" });
  button.addEventListener("click", () => explain(button, node, picture));
  words.append(button);
  node.append(drawDistribution(result));
  return node;
}

async function explain(button, node, picture) {
  button.disabled = true;
  button.textContent = "Thinking …";
  try {
    const [result] = (await post("v1/explain", [picture.file])).results;
    const replies = (result.replies || []).filter((reply) => reply.reasoning && !reply.reason);
    const list = element("ul", { className: "replies" });
    for (const reply of replies) {
      const score = reply.score === null ? "" : `${reply.score.toFixed(2)}: `;
      list.append(element("li", { textContent: score + reply.reasoning }));
    }
    if (!replies.length) list.append(element("li", { textContent: "This model writes no reasoning; it only states the score." }));
    node.append(list);
    button.remove();
  } catch (error) {
    button.disabled = false;
    button.textContent = "Reasoning";
    showProblem(error.message);
  }
}

function percent(p) { // nothing is quite sure
  return p > 0.995 ? ">99%" : p < 0.005 ? "<1%" : `${(100 * p).toFixed(0)}%`;
}

function showWins(answer) {
  const order = answer.ranking.filter((place) => place.rank !== null).map((place) => place.index);
  byId("wins").hidden = order.length < 2;
  const head = element("tr", {}, element("td"));
  for (const i of order) head.append(element("th", { scope: "col", textContent: answer.results[i].name }));
  const rows = order.map((i) => {
    const row = element("tr", {}, element("th", { scope: "row", textContent: answer.results[i].name }));
    for (const j of order) {
      const p = answer.win_probability[i][j];
      const cell = element("td", { textContent: i === j ? "–" : percent(p) });
      if (i !== j) cell.style.backgroundColor = `color-mix(in srgb, var(--bar) ${Math.round(55 * p)}%, var(--card))`;
      row.append(cell);
    }
    return row;
  });
  byId("wins").querySelector("table").replaceChildren(head, ...rows);
}

let latest = 0;
async function refresh() {
  const call = ++latest;
  byId("clear").hidden = !pictures.length;
  showProblem("");
  byId("status").textContent = pictures.length ? "Scoring …" : "";
  if (!pictures.length) {
    byId("results").replaceChildren();
    byId("wins").hidden = true;
    return;
  }
  const shown = [...pictures];
  try {
    const answer = await post("v1/rank?distribution=true", shown.map((picture) => picture.file));
    if (call !== latest) return; // pictures were added meanwhile
    byId("results").replaceChildren(...answer.ranking.map((p) => card(p, answer.results[p.index], shown[p.index])));
    showWins(answer);
    byId("status").textContent = "";
  } catch (error) {
    if (call !== latest) return;
    byId("status").textContent = "";
    showProblem(error.message);
  }
}

function add(files) {
  const room = limit - pictures.length;
  const taken = [...files].slice(0, room);
  pictures.push(...taken.map((file) => ({ file, url: URL.createObjectURL(file) })));
  refresh();
  if (taken.length < files.length) showProblem(`At most ${limit} pictures at a time; the others were left out.`);
}

byId("files").addEventListener("change", (event) => {
  add(event.target.files);
  event.target.value = "";
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    byId("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") add(event.dataTransfer.files);
  });
}
byId("examples").addEventListener("click", async () => {
  const files = EXAMPLES.map(async (name) => new File([await (await fetch(`page/examples/${name}`)).blob()], name));
  add(await Promise.all(files));
});
byId("clear").addEventListener("click", () => {
  pictures.forEach((picture) => URL.revokeObjectURL(picture.url));
  pictures = [];
  refresh();
});
byId("key").addEventListener("change", refresh);

fetch("v1/info").then((response) => response.json()).then((info) => {
  limit = info.limits.pictures;
  byId("model").textContent = `Model: ${info.model.name}.`;
  byId("limits").textContent = `Two or more are ranked; at most ${limit} at a time.`;
  byId("keybox").hidden = !info.key_required;
});
if (location.hash === "#examples") byId("examples").click();
