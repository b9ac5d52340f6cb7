"use strict";
// The browser of questions. Texts are a model's or a stranger's: they only ever become text nodes.
(() => {
  const PAGE_SIZE = 50; // entries of the list at a time: thousands of questions stay quick
  const BANDS = 10; // colours of P(+)
  const RULES = { PRM: "PRM’s choice", majority: "majority" };

  const { images, questions } = JSON.parse(document.getElementById("browser-data").textContent);
  const browser = document.getElementById("browser");
  const app = browser.querySelector(".app");
  const part = Object.fromEntries([...app.querySelectorAll("[data-part]")].map((node) => [node.dataset.part, node]));
  const scored = questions.some((question) => question.prm !== null);

  // Small helpers.

  function element(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === true) node.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, String(value));
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  // A text of the data: control characters get their pictures, or nobody would see that they are there.
  function visible(text) {
    return String(text).replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, (sign) =>
      String.fromCharCode(sign === "\u007f" ? 0x2421 : 0x2400 + sign.charCodeAt(0)));
  }

  // Isolated, so that marks of direction in one text cannot turn its neighbours.
  function foreign(tag, className, text) {
    return element(tag, { class: className, dir: "auto" }, visible(text));
  }

  const letter = (position) => String.fromCharCode(65 + position);
  const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

  function verdict(share) {
    if (share === 1) return ["right", "✓ right"];
    return share === 0 ? ["wrong", "✗ wrong"] : ["tied", `≈ tied, ${Math.round(100 * share)}%`];
  }

  // What is shown: outcome, facets, search.

  const allWrong = (question) => !question.oracle;
  const allRight = (question) => question.candidates.length > 0 && question.candidates.every((one) => one.correct);
  const OUTCOMES = [
    ["all", "all", () => true],
    ...(scored
      ? [
          // A tie in the vote has a share of the credit: what counts is who has more of it.
          ["lost", "PRM wrong, majority right", (one) => one.prm !== null && one.majority > one.prm],
          ["won", "PRM right, majority wrong", (one) => one.prm !== null && one.prm > one.majority],
          ["missed", "both wrong, a right one exists", (one) => one.prm === 0 && one.majority === 0 && one.oracle],
        ]
      : [
          ["right", "majority right", (one) => one.majority > 0],
          ["missed", "majority wrong, a right one exists", (one) => one.majority === 0 && one.oracle],
        ]),
    ["none", "all candidates wrong", allWrong],
    ["every", "all candidates right", allRight],
  ];
  const outcomeTest = Object.fromEntries(OUTCOMES.map(([name, , test]) => [name, test]));

  // Ids need not be unique, addresses do.
  const keys = new Map();
  questions.forEach((question, position) => {
    let key = question.id;
    while (keys.has(key)) key += "'";
    question.key = key;
    keys.set(key, position);
  });

  const facets = new Map();
  for (const question of questions)
    for (const [name, value] of Object.entries(question.facets)) {
      if (!facets.has(name)) facets.set(name, new Map());
      facets.get(name).set(value, (facets.get(name).get(value) || 0) + 1);
    }

  function searched(question) {
    if (question.searched === undefined) {
      const candidates = question.candidates.flatMap((one) => [one.answer || "", ...one.steps.map((step) => step[0])]);
      question.searched = [question.id, question.text, question.answer || "", ...question.options, ...candidates]
        .join("\n").toLowerCase();
    }
    return question.searched;
  }

  // Where the reader is. `shown` are the positions of the questions that pass, `passed` those of every outcome.
  const state = { question: 0, outcome: "all", facets: {}, find: "", order: "", shown: [], passed: [] };

  function select() {
    const words = state.find.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = Object.entries(state.facets);
    state.passed = [];
    questions.forEach((question, position) => {
      if (chosen.every(([name, value]) => question.facets[name] === value) &&
          words.every((word) => searched(question).includes(word))) state.passed.push(position);
    });
    state.shown = state.passed.filter((position) => outcomeTest[state.outcome](questions[position]));
    // Where nothing passes, the question is kept for when the filters are opened again.
    if (state.shown.length && !state.shown.includes(state.question)) state.question = state.shown[0];
  }

  // The address.

  function address(position) {
    const fields = new URLSearchParams();
    if (questions.length) fields.set("q", questions[position].key);
    if (state.outcome !== "all") fields.set("show", state.outcome);
    for (const [name, value] of Object.entries(state.facets)) fields.set(`is.${name}`, value);
    if (state.find) fields.set("find", state.find);
    return `#${fields}`;
  }

  let pending = 0;
  // Browsers refuse hundreds of addresses in seconds, so a key held down writes the last one only.
  function remember({ replace = false, later = false } = {}) {
    clearTimeout(pending);
    const write = () => {
      const hash = address(state.question);
      if (hash === location.hash) return;
      if (replace) history.replaceState(null, "", hash);
      else history.pushState(null, "", hash);
    };
    if (later) pending = setTimeout(write, 250);
    else write();
  }

  // Returns whether the address names anything of ours: it may be an anchor of the page's.
  function recall() {
    const fields = new URLSearchParams(location.hash.slice(1));
    const ours = [...fields.keys()].some((name) => ["q", "show", "find"].includes(name) || name.startsWith("is."));
    if (!ours && location.hash) return false;
    clearTimeout(pending);
    state.outcome = Object.hasOwn(outcomeTest, fields.get("show")) ? fields.get("show") : "all";
    state.facets = {};
    for (const [name, values] of facets)
      if (values.has(fields.get(`is.${name}`))) state.facets[name] = fields.get(`is.${name}`);
    state.find = fields.get("find") || "";
    state.question = keys.has(fields.get("q")) ? keys.get(fields.get("q")) : 0;
    return ours;
  }

  // The list.

  function mark(rule, share) {
    const [kind, text] = verdict(share);
    return element("span", { class: `mark ${kind}` }, `${rule} ${text}`);
  }

  function entry(position) {
    const question = questions[position];
    const right = question.candidates.filter((one) => one.correct).length;
    return element("li", {},
      element("a", { href: address(position), "aria-current": position === state.question ? "true" : null },
        element("span", { class: "entry-head" }, foreign("b", "entry-id", question.id),
          element("span", { class: "entry-share" }, `${right}/${question.candidates.length} right`)),
        foreign("span", "entry-text", question.text.slice(0, 160)),
        element("span", { class: "entry-marks" },
          question.prm === null ? null : mark("PRM", question.prm), mark("majority", question.majority))));
  }

  function drawList() {
    const at = Math.max(0, state.shown.indexOf(state.question));
    const first = at - (at % PAGE_SIZE);
    const last = Math.min(first + PAGE_SIZE, state.shown.length);
    const focused = part.list.contains(document.activeElement);
    part.list.replaceChildren(...state.shown.slice(first, last).map(entry));
    part.list.setAttribute("start", first + 1);
    part.pager.hidden = state.shown.length <= PAGE_SIZE;
    part.span.textContent = `${first + 1}–${last} of ${state.shown.length.toLocaleString("en")}`;
    part.earlier.disabled = first === 0;
    part.later.disabled = last === state.shown.length;
    const current = part.list.querySelector("[aria-current]");
    if (!current) return;
    // The list's own scroll alone: scrollIntoView would move the page as well.
    const [outer, inner] = [part.list.getBoundingClientRect(), current.getBoundingClientRect()];
    if (inner.top < outer.top) part.list.scrollTop += inner.top - outer.top;
    if (inner.bottom > outer.bottom) part.list.scrollTop += inner.bottom - outer.bottom;
    if (focused) current.focus({ preventScroll: true });
  }

  function drawFilters() {
    for (const button of part.outcomes.children) {
      const name = button.dataset.outcome;
      const count = state.passed.filter((position) => outcomeTest[name](questions[position])).length;
      button.setAttribute("aria-pressed", String(name === state.outcome));
      button.lastChild.textContent = count.toLocaleString("en");
    }
    for (const box of part.facets.querySelectorAll("select")) box.value = state.facets[box.dataset.facet] ?? "";
    if (part.find.value !== state.find) part.find.value = state.find;
    part.count.textContent = `${state.shown.length.toLocaleString("en")} of ${plural(questions.length, "question")} shown`;
    part.clear.disabled = state.outcome === "all" && !state.find && !Object.keys(state.facets).length;
  }

  // The question.

  function optionList(question) {
    const votes = (name) => question.candidates.filter((one) => one.answer === name).length;
    const chosen = (name, rule) =>
      question.candidates.some((one) => one.answer === name && one.chosen.includes(rule)) ? badge(rule) : null;
    return element("ol", { class: "options", "aria-label": "Options" }, ...question.options.map((text, position) => {
      const name = letter(position);
      const right = name === question.answer;
      return element("li", { class: right ? "right-option" : null },
        element("span", { class: "letter" }, name), foreign("span", "option-text", text),
        element("span", { class: "option-marks" },
          right ? element("span", { class: "mark right" }, "✓ right answer") : null,
          ...Object.keys(RULES).map((rule) => chosen(name, rule)),
          votes(name) ? element("span", { class: "votes" }, plural(votes(name), "candidate")) : null));
    }));
  }

  function badge(rule) {
    return element("span", { class: "badge", "data-rule": rule }, `${rule === "PRM" ? "★" : "●"} `,
      foreign("span", "", RULES[rule] || `chosen by ${rule}`));
  }

  // A score's colour comes with its number, always.
  function score(value, places) {
    const band = value >= 0 && value <= 1 ? Math.min(BANDS - 1, Math.floor(BANDS * value)) : null;
    return element("span", { class: "score", "data-band": band },
      value && Math.abs(value) < 10 ** -places ? value.toExponential(1) : value.toFixed(places));
  }

  function step([text, value, truth], position) {
    const band = value === null ? null : Math.min(BANDS - 1, Math.max(0, Math.floor(BANDS * value)));
    const [kind, said] = { 1: ["right", "✓ right step"], "-1": ["wrong", "✗ wrong step"], 0: ["tied", "– neutral step"] }[truth] || [];
    return element("li", { class: "step", "data-band": band },
      element("span", { class: "step-head" }, element("span", { class: "step-number" }, `Step ${position + 1}`),
        kind ? element("span", { class: `mark ${kind}` }, said) : null,
        value === null ? null : element("span", { class: "step-score" },
          element("span", { class: "hidden-text" }, "score "), value.toFixed(2))),
      foreign("span", "step-text", text));
  }

  function card(question, candidate, position) {
    const id = `browser-candidate-${position}`;
    const better = question.candidates.filter((one) => one.score > candidate.score).length;
    return element("article", { class: "candidate", "aria-labelledby": id, "data-chosen": candidate.chosen.includes("PRM") },
      element("header", {},
        element("div", { class: "card-line" }, element("h4", { id }, `Candidate ${position + 1}`),
          element("span", { class: `mark ${candidate.correct ? "right" : "wrong"}` }, candidate.correct ? "✓ right" : "✗ wrong")),
        element("div", { class: "card-answer" }, "Answer ",
          candidate.answer === null ? element("i", {}, "none recognised") : foreign("b", "", candidate.answer)),
        candidate.score === null ? null : element("div", { class: "card-score" }, "Score ", score(candidate.score, 3),
          element("span", { class: "rank" }, `no. ${better + 1} of ${question.candidates.length}`)),
        element("div", { class: "card-badges" }, ...candidate.chosen.map(badge))),
      candidate.steps.length
        ? element("ol", { class: "steps", "aria-label": `Steps of candidate ${position + 1}` }, ...candidate.steps.map(step))
        : element("p", { class: "note" }, "An empty response."));
  }

  function cards(question) {
    const numbered = question.candidates.map((candidate, position) => [candidate, position]);
    if (state.order === "score") numbered.sort(([a], [b]) => (b.score ?? -Infinity) - (a.score ?? -Infinity));
    return numbered.map(([candidate, position]) => card(question, candidate, position));
  }

  function legend(question) {
    if (!question.candidates.some((one) => one.steps.some((each) => each[1] !== null))) return null;
    const swatches = Array.from({ length: BANDS }, (_, band) => element("span", { class: "swatch", "data-band": band }));
    return element("p", { class: "legend" }, element("span", {}, "Step score, P(+):"),
      element("span", { class: "legend-end" }, "0 wrong"), element("span", { class: "swatches", "aria-hidden": "true" }, ...swatches),
      element("span", { class: "legend-end" }, "1 right"));
  }

  function picture(image, position, count) {
    const node = element("img", { src: images[image], alt: `image ${position + 1} of ${count} of the question` });
    const tiny = () => node.classList.toggle("tiny", node.naturalWidth < 120);
    if (node.complete) tiny();
    node.addEventListener("load", tiny);
    return node;
  }

  function outcomeLine(question) {
    const right = question.candidates.filter((one) => one.correct).length;
    const all = question.candidates.length;
    return element("p", { class: "outcome-line" },
      question.prm === null ? null : mark("PRM", question.prm), mark("majority", question.majority),
      element("span", { class: "tag" }, `${right} of ${plural(all, "candidate")} right`),
      ...Object.entries(question.facets).map(([name, value]) =>
        element("span", { class: "tag" }, element("span", { class: "tag-name" }, `${visible(name)} `), foreign("span", "", value))));
  }

  function drawQuestion() {
    const focused = part.body.contains(document.activeElement);
    const question = state.shown.length ? questions[state.question] : null;
    const at = state.shown.indexOf(state.question);
    part.previous.disabled = at <= 0;
    part.next.disabled = at + 1 >= state.shown.length;
    part.heading.replaceChildren(question ? foreign("span", "", question.id) : "No question passes these filters");
    part.position.textContent = question ? `${(at + 1).toLocaleString("en")} of ${state.shown.length.toLocaleString("en")}` : "";
    const said = question && [question.prm === null ? "" : `PRM ${verdict(question.prm)[1]}, `, "majority ", verdict(question.majority)[1]];
    part.status.textContent = question ? `Question ${at + 1} of ${state.shown.length}: ${said.join("")}` : "No question shown";
    part.body.replaceChildren(...(question ? questionParts(question) : [element("p", { class: "note" }, "Change or clear the filters above.")]));
    if (focused) part.heading.focus({ preventScroll: true });
  }

  function questionParts(question) {
    const letters = question.options.map((_, position) => letter(position));
    const pictures = question.images.map((image, position) => picture(image, position, question.images.length));
    return [
      outcomeLine(question),
      foreign("p", "asked", question.text),
      element("div", { class: "given" }, pictures.length ? element("div", { class: "pictures" }, ...pictures) : null,
        question.options.length ? optionList(question) : null),
      question.answer === null ? element("p", { class: "note" }, "The right answer is not known.")
        : letters.includes(question.answer) ? null
        : element("p", { class: "right-answer" }, element("span", { class: "mark right" }, "✓ right answer"), " ", foreign("b", "", question.answer)),
      element("div", { class: "candidates-head" }, element("h4", {}, plural(question.candidates.length, "candidate")), legend(question)),
      element("div", { class: "candidates", role: "region", tabindex: 0, "aria-label": "Candidates, side by side" },
        ...cards(question)),
    ].filter(Boolean);
  }

  function draw() {
    select();
    drawFilters();
    drawList();
    drawQuestion();
  }

  // Moves.

  function inView() {
    const { top } = part.body.parentElement.getBoundingClientRect();
    if (top < 0 || top > innerHeight / 2) part.body.parentElement.scrollIntoView({ block: "start" });
  }

  function move(by, later = false) {
    const to = state.shown.indexOf(state.question) + by;
    if (to < 0 || to >= state.shown.length) return;
    state.question = state.shown[to];
    drawList();
    drawQuestion();
    inView();
    remember({ later });
  }

  function turn(by) {
    const at = state.shown.indexOf(state.question);
    const first = at - (at % PAGE_SIZE) + by * PAGE_SIZE;
    move(Math.max(0, Math.min(first, state.shown.length - 1)) - at);
    part.list.scrollTop = 0;
  }

  function change(fields, how) {
    Object.assign(state, fields);
    draw();
    remember(how);
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || part.keys.open) return;
    if (event.key === "Escape" && event.target === part.find) return part.heading.focus();
    if (event.target.closest("input, select, textarea")) return;
    const inList = part.list.contains(event.target);
    const scrolls = event.target.closest(".candidates, .scroll, pre"); // arrows scroll what has the focus
    const letters = part.single.checked;
    const moves = { ...(letters ? { j: 1, k: -1 } : {}), ...(scrolls ? {} : { ArrowRight: 1, ArrowLeft: -1 }),
      ...(inList ? { ArrowDown: 1, ArrowUp: -1 } : {}) };
    if (event.key in moves) move(moves[event.key], event.repeat);
    else if (letters && event.key === "/") part.find.focus();
    else if (letters && event.key === "?") part.keys.showModal();
    else return;
    event.preventDefault();
  }

  function build() {
    part.outcomes.append(...OUTCOMES.map(([name, label]) =>
      element("button", { type: "button", "data-outcome": name }, `${label} `, element("span", { class: "chip-count" }))));
    for (const [name, values] of facets) {
      const sorted = [...values].sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
      const choices = sorted.map(([value, count]) => element("option", { value }, `${visible(value)} (${count})`));
      const box = element("select", { "data-facet": name }, element("option", { value: "" }, "any"), ...choices);
      part.facets.append(element("label", {}, foreign("span", "", name), box));
    }
  }

  function listen() {
    part.outcomes.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) change({ outcome: button.dataset.outcome });
    });
    part.facets.addEventListener("change", (event) => {
      const { [event.target.dataset.facet]: _, ...others } = state.facets;
      change({ facets: event.target.value ? { ...others, [event.target.dataset.facet]: event.target.value } : others });
    });
    part.order.hidden = !scored;
    part.order.addEventListener("change", (event) => {
      state.order = event.target.value;
      drawQuestion();
    });
    let typing = 0;
    part.find.addEventListener("input", () => {
      clearTimeout(typing);
      typing = setTimeout(() => change({ find: part.find.value }, { replace: true }), 120);
    });
    part.clear.addEventListener("click", () => change({ outcome: "all", facets: {}, find: "" }));
    part.previous.addEventListener("click", () => move(-1));
    part.next.addEventListener("click", () => move(1));
    part.earlier.addEventListener("click", () => turn(-1));
    part.later.addEventListener("click", () => turn(1));
    part.skip.addEventListener("click", () => part.heading.focus());
    part.help.addEventListener("click", () => part.keys.showModal());
    part.close.addEventListener("click", () => part.keys.close());
    document.addEventListener("keydown", onKey);
    addEventListener("hashchange", () => {
      const before = state.question;
      recall();
      draw();
      if (state.question !== before) inView();
    });
  }

  build();
  listen();
  const linked = recall();
  app.hidden = false;
  draw();
  if (linked) browser.scrollIntoView();
})();
