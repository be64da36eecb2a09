// The browser of rollouts: list, filters, one group at a time. Follows app.js in the same script.
function browseRollouts() {
  const VERDICTS = {
    correct: ["✓", "correct"], wrong: ["✗", "wrong"], no_answer: ["–", "no answer"],
    bad_gold: ["!", "bad gold"], timeout: ["!", "timeout"], crash: ["!", "crash"],
  };
  // The model's own second look; forced ones are known from their segments.
  const OWN = /\b(?:wait|alternatively|re-?(?:think|check|evaluate|examine|consider)|double[- ]check|check again|let me check)\b/gi;
  // Characters that would not be seen, or would move others: direction marks, controls, halves of surrogate pairs.
  const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
  const state = { set: data.sets.length - 1, group: 0, shown: [] };
  const verdictClass = (name) => (name in VERDICTS ? name : "unknown");
  const isCorrect = (sample) => sample.verdict === "correct";
  const firstText = (sample) => sample.segments.filter((s) => s.kind === "first").map((s) => s.text).join("");

  function rethinksUnforced(sample) {
    return !sample.forced && firstText(sample).search(OWN) >= 0;
  }

  const places = new Map(); // problem id → where it occurs, to follow it through training
  data.sets.forEach((set, s) => set.groups.forEach((group, g) => {
    if (!places.has(group.id)) places.set(group.id, []);
    places.get(group.id).push([s, g]);
    const texts = group.samples.flatMap((sample) => sample.segments.map((segment) => segment.text));
    group.haystack = [group.id, group.question, group.answer, ...group.choices, ...texts].join("\n").toLowerCase();
    const numCorrect = group.samples.filter(isCorrect).length;
    group.numCorrect = numCorrect;
    group.mixed = numCorrect > 0 && numCorrect < group.samples.length;
    group.forced = group.samples.some((sample) => sample.forced);
    group.own = group.samples.some(rethinksUnforced);
  }));

  const present = new Set(data.sets.flatMap((set) => set.groups.flatMap((g) => g.samples.map((s) => s.verdict))));
  for (const name of present) {
    const option = make("option", "", (VERDICTS[name] || ["", name])[1]);
    option.value = name;
    byId("verdict").append(option);
  }

  data.sets.forEach((set, index) => {
    const samples = set.groups.flatMap((group) => group.samples);
    const share = samples.length ? samples.filter(isCorrect).length / samples.length : 0;
    const fill = make("i");
    fill.style.width = `${100 * share}%`;
    const name = set.step === null ? set.label.replace(" training", "") : set.label;
    const button = make("button", "", name, make("small", "", `${Math.round(100 * share)}%`), make("span", "meter", fill));
    button.type = "button";
    button.title = `${set.label}: ${set.groups.length} of ${set.num_groups} groups here, ${Math.round(100 * share)}% of their samples correct`;
    button.addEventListener("click", () => openSet(index));
    byId("sets").append(button);
  });

  function appendText(parent, text) {
    let from = 0;
    for (const match of text.matchAll(CONTROL)) {
      parent.append(text.slice(from, match.index));
      const code = match[0].charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
      parent.append(make("span", "ctl", `U+${code}`));
      from = match.index + match[0].length;
    }
    parent.append(text.slice(from));
  }

  // Last complete, non-empty \boxed{...} with balanced braces: [start, end) of its content, or null.
  function lastBox(text) {
    for (let at = text.lastIndexOf("\\boxed{"); at >= 0; at = at ? text.lastIndexOf("\\boxed{", at - 1) : -1) {
      const start = at + 7;
      let depth = 1;
      for (let i = start; i < text.length; i++) {
        if (text[i] === "{") depth++;
        if (text[i] === "}" && --depth === 0) {
          if (text.slice(start, i).trim()) return [start, i];
          break;
        }
      }
    }
    return null;
  }

  function answerSpan(text, extracted) {
    const box = lastBox(text);
    if (box) return box;
    const at = extracted ? text.lastIndexOf(extracted) : -1;
    return at < 0 ? null : [at, at + extracted.length];
  }

  // The answer's place matters only where a verdict was passed on it.
  function markedText(parent, text, verdict, extracted, markOwn) {
    const marks = markOwn ? [...text.matchAll(OWN)].map((m) => [m.index, m.index + m[0].length, "own"]) : [];
    const span = verdict === "no_answer" ? null : answerSpan(text, extracted);
    if (span) marks.push([span[0], span[1], `answer ${verdictClass(verdict)}`]);
    marks.sort((a, b) => a[0] - b[0]);
    let from = 0;
    for (const [start, end, className] of marks) {
      if (start < from) continue;
      appendText(parent, text.slice(from, start));
      const node = make("span", className);
      appendText(node, text.slice(start, end));
      parent.append(node);
      from = end;
    }
    appendText(parent, text.slice(from));
  }

  function chip(verdict) {
    const [icon, word] = VERDICTS[verdict] || ["?", verdict || "no verdict"];
    return make("span", `chip ${verdictClass(verdict)}`, make("span", "", icon), word);
  }

  function completionText(sample) {
    const body = make("div", "text");
    body.tabIndex = 0;
    const lastKind = sample.segments.length ? sample.segments[sample.segments.length - 1].kind : "";
    let look = null; // trigger and second look, one tinted block
    for (const segment of sample.segments) {
      const second = segment.kind !== "first";
      if (second && !look) body.append(look = make("div", "look"));
      if (segment.kind === "trigger") {
        const mark = make("mark");
        appendText(mark, segment.text.replace(/^\n+/, ""));
        look.append(mark);
      } else {
        const verdict = second || lastKind === "first" ? sample.verdict : sample.first_verdict;
        const part = make("span", second ? "second" : "first");
        markedText(part, segment.text, verdict, segment.kind === lastKind ? sample.extracted : null, !second && !sample.forced);
        (second ? look : body).append(part);
      }
    }
    return body;
  }

  function advantageBar(value, scale) {
    const bar = make("i", value > 0 ? "up" : "down");
    const width = (50 * Math.min(Math.abs(value), scale)) / scale;
    bar.style.width = `${width}%`;
    bar.style.left = `${value > 0 ? 50 : 50 - width}%`;
    const signed = (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(2);
    return make("div", "advantage", make("div", "track", bar), make("span", "", `advantage ${signed}`));
  }

  function fact(name, value) {
    const strong = make("b");
    appendText(strong, value);
    return make("span", "", `${name} `, strong);
  }

  function sampleCard(sample, scale, isTraining) {
    const card = make("section", `card sample ${verdictClass(sample.verdict)}`);
    const wanted = byId("verdict").value;
    card.classList.toggle("dim", wanted !== "" && sample.verdict !== wanted);
    const head = make("header", "", make("span", "number", `#${sample.sample + 1}`));
    if (sample.forced) head.append(chip(sample.first_verdict), make("span", "turn", "→"));
    head.append(chip(sample.verdict));
    const line = make("div", "facts-line");
    if (sample.extracted !== null) line.append(fact("answer", sample.extracted));
    if (sample.rule) line.append(fact("by", sample.rule));
    if (sample.reward !== null) line.append(fact("reward", String(Number(sample.reward.toFixed(3)))));
    if (sample.num_tokens !== null) line.append(fact("tokens", String(sample.num_tokens)));
    if (sample.finish_reason === "length") line.append(make("span", "warn", "cut at the limit"));
    const foot = make("footer");
    if (isTraining && sample.advantage !== null) foot.append(advantageBar(sample.advantage, scale));
    foot.append(line);
    card.append(head, completionText(sample), foot);
    return card;
  }

  function setPixels(img, image, target) {
    const small = Math.max(image.width, image.height) <= 256;
    img.classList.toggle("pixelated", small);
    const factor = small ? Math.max(1, Math.floor(target / Math.max(image.width, image.height))) : 1;
    img.style.width = small ? `${image.width * factor}px` : "";
    return factor;
  }

  function picture(key, index, group) {
    const image = data.images[key];
    if (!image) return make("div", "missing", `image ${index + 1} could not be read`);
    const img = make("img");
    img.src = image.uri;
    img.alt = `image ${index + 1} of problem ${group.id}`;
    const factor = setPixels(img, image, group.images.length > 1 ? 168 : 252);
    const note = `${image.width}×${image.height} px` + (factor > 1 ? `, shown ×${factor}` : "") + (image.redrawn ? ", smaller copy" : "");
    const button = make("button", "", img, make("small", "", note));
    button.type = "button";
    button.addEventListener("click", () => {
      const big = byId("zoom").querySelector("img");
      big.src = image.uri;
      setPixels(big, image, 0.85 * Math.min(window.innerWidth, window.innerHeight));
      byId("zoom").showModal();
    });
    return button;
  }
  byId("zoom").addEventListener("click", () => byId("zoom").close());

  function squares(group) {
    return make("span", "squares", ...group.samples.map((sample) =>
      make("i", verdictClass(sample.verdict) + (sample.forced ? " forced" : ""))));
  }

  function elsewhere(group) {
    const found = places.get(group.id);
    const row = make("div", "elsewhere", make("span", "label", "this problem at"));
    for (const [s, g] of found) {
      const other = data.sets[s].groups[g];
      const button = make("button", "plain", `${data.sets[s].label} · ${other.numCorrect}/${other.samples.length}`);
      button.type = "button";
      button.setAttribute("aria-current", String(other === group));
      button.addEventListener("click", () => { clearFilters(); openSet(s, g); });
      row.append(button);
    }
    return found.length > 1 && group.id ? row : null;
  }

  function moveButtons(at) {
    const move = make("span", "move");
    for (const [sign, by, name] of [["←", -1, "previous problem"], ["→", 1, "next problem"]]) {
      const button = make("button", "", sign);
      button.type = "button";
      button.title = name;
      button.addEventListener("click", () => moveGroup(by));
      move.append(button);
    }
    const tall = make("button", "", "whole texts");
    tall.type = "button";
    tall.setAttribute("aria-pressed", String(byId("group").classList.contains("tall")));
    tall.addEventListener("click", () => {
      tall.setAttribute("aria-pressed", String(byId("group").classList.toggle("tall")));
    });
    move.prepend(`${at + 1} of ${state.shown.length}`);
    move.append(tall);
    return move;
  }

  function question(group) {
    const node = make("p", "question");
    for (const part of group.question.split(/(<image>)/)) {
      if (part === "<image>") node.append(make("span", "tag", "▣ "));
      else appendText(node, part);
    }
    return node;
  }

  const isLong = (group) => group.samples.some((sample) => sample.segments.some((s) => s.text.length > 400));

  function showGroup() {
    const view = byId("group");
    const set = data.sets[state.set];
    const at = state.shown.indexOf(state.group);
    if (at < 0) {
      view.replaceChildren(make("p", "card empty", "No group passes these filters."));
      return;
    }
    const group = set.groups[state.group];
    const gold = make("b");
    appendText(gold, group.answer);
    const kind = [group.source, group.type].filter(Boolean).join(" · ");
    const choices = make("ul", "choices", ...group.choices.map((choice) => {
      const item = make("li", choice === group.answer ? "gold" : "");
      appendText(item, choice);
      return item;
    }));
    const prompt = make("pre");
    appendText(prompt, group.prompt_text);
    const about = make("div", "about",
      make("div", "bar", make("span", "id", set.label), group.id ? make("span", "id", group.id) : null,
        kind ? make("span", "", kind) : null, moveButtons(at)),
      question(group), group.choices.length ? choices : null,
      make("div", "gold-line", make("span", "label", "gold answer"), gold,
        make("span", "label", `${group.numCorrect} of ${group.samples.length} correct`), squares(group)),
      elsewhere(group),
      group.prompt_text ? make("details", "prompt", make("summary", "", "prompt as the model saw it"), prompt) : null);
    const pictures = make("div", "pictures", ...group.images.map((key, i) => picture(key, i, group)));
    const scale = Math.max(1, ...set.groups.flatMap((g) => g.samples.map((s) => Math.abs(s.advantage || 0))));
    view.replaceChildren(
      make("div", "card problem", group.images.length ? pictures : null, about),
      make("div", isLong(group) ? "samples long" : "samples", ...group.samples.map((sample) => sampleCard(sample, scale, set.step !== null))));
  }

  function listItem(group, index) {
    const first = data.images[group.images[0]];
    const thumb = make(first ? "img" : "span", "thumb", ...(first ? [] : ["text"]));
    if (first) {
      thumb.loading = "lazy";
      thumb.alt = "";
      thumb.src = first.uri;
    }
    const title = make("span", "title");
    appendText(title, group.question.replaceAll("<image>", "").trim() || group.id);
    const item = make("li", "", thumb, title, make("span", "under", squares(group), make("span", "source", group.source)));
    item.id = `item-${index}`;
    item.setAttribute("role", "option");
    item.addEventListener("click", () => selectGroup(index));
    return item;
  }

  function passes(group) {
    const wanted = byId("verdict").value;
    const words = byId("search").value.trim().toLowerCase();
    return (!byId("source").value || group.source === byId("source").value)
      && (!wanted || group.samples.some((sample) => sample.verdict === wanted))
      && (!byId("mixed").checked || group.mixed)
      && (!byId("forced").checked || group.forced)
      && (!byId("own").checked || group.own)
      && (!words || group.haystack.includes(words));
  }

  function clearFilters() {
    for (const id of ["source", "verdict", "search"]) byId(id).value = "";
    for (const id of ["mixed", "forced", "own"]) byId(id).checked = false;
  }

  function refresh() {
    const set = data.sets[state.set];
    state.shown = set.groups.map((_, index) => index).filter((index) => passes(set.groups[index]));
    if (!state.shown.includes(state.group)) state.group = state.shown.length ? state.shown[0] : -1;
    byId("list").replaceChildren(...state.shown.map((index) => listItem(set.groups[index], index)));
    byId("count").textContent = `${state.shown.length} of ${set.groups.length} groups`;
    [...byId("sets").children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === state.set)));
    selectGroup(state.group);
  }

  function selectGroup(index) {
    state.group = index;
    const list = byId("list");
    for (const item of list.children) item.setAttribute("aria-selected", String(item.id === `item-${index}`));
    const item = byId(`item-${index}`);
    if (item) {
      list.setAttribute("aria-activedescendant", item.id);
      if (item.offsetTop < list.scrollTop) list.scrollTop = item.offsetTop;
      const over = item.offsetTop + item.offsetHeight - list.clientHeight;
      if (over > list.scrollTop) list.scrollTop = over;
    }
    showGroup();
    if (state.touched) history.replaceState(null, "", `#${data.sets[state.set].name}/${index}`);
    state.touched = true;
  }

  function openSet(index, group = 0) {
    state.set = Math.min(Math.max(index, 0), data.sets.length - 1);
    state.group = group;
    refresh();
  }

  function moveGroup(by) {
    const at = state.shown.indexOf(state.group) + by;
    if (at >= 0 && at < state.shown.length) selectGroup(state.shown[at]);
  }

  for (const id of ["source", "verdict", "mixed", "forced", "own"]) byId(id).addEventListener("change", refresh);
  byId("search").addEventListener("input", refresh);

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("zoom").open) return;
    const field = event.target.closest("input:not([type=checkbox]), select");
    const sideways = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const upright = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (field) return;
    if (sideways && event.shiftKey) openSet(state.set + sideways);
    else if (sideways) moveGroup(sideways);
    else if (upright && event.target === byId("list")) moveGroup(upright);
    else return;
    event.preventDefault();
  });

  const [name, index] = location.hash.slice(1).split("/");
  const linked = data.sets.findIndex((set) => set.name === name);
  openSet(linked < 0 ? state.set : linked, linked < 0 ? 0 : Number(index) || 0);
}

if (byId("sets")) browseRollouts();
