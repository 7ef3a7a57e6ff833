() => {
  // Names for those who do not see the page: the buttons that hold nothing but a picture.
  const name = () => {
    document.querySelectorAll(".examples .gallery-item").forEach((node, k) =>
      node.getAttribute("aria-label") || node.setAttribute("aria-label", `Scene ${k + 1}`));
    document.querySelectorAll("button:has(> .image-frame):not([aria-label])").forEach((node) =>
      node.setAttribute("aria-label", "Picture"));
    document.querySelectorAll(".cm-scroller[tabindex='-1']").forEach((node) => { node.tabIndex = 0; });
  };
  // Generate and Cancel take each other's place: the keyboard stays there.
  let last = "";
  document.addEventListener("focusin", (event) => { last = event.target.id ?? ""; });
  document.addEventListener("pointerdown", () => { last = ""; });
  const stay = () => {
    if (!["generate", "cancel"].includes(last) || document.activeElement !== document.body) return;
    [...document.querySelectorAll("#generate, #cancel")].find((node) => node.offsetParent)?.focus();
  };
  // What the browser refuses of camera and clipboard is told; gradio leaves it to the console.
  const refusal = ({ name, message }) => {
    if (!window.isSecureContext && name === "TypeError")
      return "browsers give camera and clipboard to pages at https:// and on this machine alone: upload the photo";
    if (/clipboard/i.test(message)) return "the browser does not let this page read the clipboard: allow it, or upload the photo";
    return {
      NotAllowedError: "the browser does not let this page use the camera: allow it, or upload a photo",
      NotFoundError: "the browser finds no camera: upload a photo",
      NotReadableError: "the camera gives no picture, another program may have it: upload a photo",
    }[name] ?? "";
  };
  const tell = (text) => {
    window.controlkitRefused = text;
    document.getElementById("refused")?.click();
  };
  window.addEventListener("unhandledrejection", (event) => {
    const text = event.reason ? refusal(event.reason) : "";
    if (!text) return;
    event.preventDefault();
    tell(text);
  });
  // Where there is no such thing as a camera, gradio would tell it by the name of a text.
  const none = () => Promise.reject(new TypeError("no camera"));
  if (!navigator.mediaDevices)
    Object.defineProperty(navigator, "mediaDevices", { value: { getUserMedia: none, enumerateDevices: none } });
  // Pasted words are no photo: gradio passes over them without a word.
  const clipboard = navigator.clipboard, read = clipboard?.read?.bind(clipboard);
  if (read) clipboard.read = async () => {
    const items = await read();
    if (!items.some((item) => item.types.some((type) => type.startsWith("image/"))))
      tell("there is no picture in the clipboard");
    return items;
  };
  // Where the page is one column, pictures in the making would be out of sight.
  document.addEventListener("click", (event) => {
    const result = document.getElementById("status");
    if (!event.target.closest?.("#generate") || !result) return;
    const box = result.getBoundingClientRect();
    if (box.top > window.innerHeight || box.bottom < 0)
      document.querySelector(".pictures h2")?.scrollIntoView({ behavior: "smooth", block: "start" });
  });
  // A reload opens the tab that was open, of this page alone: another one of the same browser has its own.
  const TAB = "controlkit-tab", titleOf = (tab) => tab.innerText.trim();
  let opened = false;
  const keepTab = () => {
    const tabs = [...document.querySelectorAll('button[role="tab"]')];
    const open = tabs.find((tab) => tab.ariaSelected === "true");
    if (!open) return;
    try {
      if (opened) return sessionStorage.setItem(TAB, titleOf(open));
      opened = true;
      tabs.find((tab) => tab !== open && titleOf(tab) === sessionStorage.getItem(TAB))?.click();
    } catch { opened = true; }  // a browser that keeps nothing
  };
  const changed = () => { name(); stay(); keepTab(); };
  changed();
  new MutationObserver(changed).observe(document.body, { childList: true, subtree: true, attributes: true,
    attributeFilter: ["class", "hidden", "style"] });
}
