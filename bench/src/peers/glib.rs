//! The few functions of glib that QEMU's virtio-iommu keeps its mappings with, if the library is on this machine.
//! Loaded at run time: nothing is needed to build.
#![expect(unsafe_code, reason = "glib is C: its trees are what is measured")]

use std::ffi::{CStr, c_int, c_void};
use std::sync::OnceLock;

use anyhow::bail;

pub(crate) type Pointer = *mut c_void;
type Compare = extern "C" fn(*const c_void, *const c_void, Pointer) -> c_int;
type Destroy = unsafe extern "C" fn(Pointer);
type Traverse = extern "C" fn(Pointer, Pointer, Pointer) -> c_int;

type NewTree = unsafe extern "C" fn(Compare, Pointer, Option<Destroy>, Option<Destroy>) -> Pointer;
type Insert = unsafe extern "C" fn(Pointer, Pointer, Pointer);
type Remove = unsafe extern "C" fn(Pointer, *const c_void) -> c_int;
type Lookup = unsafe extern "C" fn(Pointer, *const c_void) -> Pointer;
type LookupExtended = unsafe extern "C" fn(Pointer, *const c_void, *mut Pointer, *mut Pointer) -> c_int;
type Foreach = unsafe extern "C" fn(Pointer, Traverse, Pointer);
type Allocate = unsafe extern "C" fn(usize) -> Pointer;

struct Functions {
    tree_new_full: NewTree,
    tree_insert: Insert,
    tree_remove: Remove,
    tree_lookup: Lookup,
    tree_lookup_extended: LookupExtended,
    tree_foreach: Foreach,
    malloc0: Allocate,
    free: Destroy,
}

const LIBRARY: &CStr = c"libglib-2.0.so.0";

static FUNCTIONS: OnceLock<Option<Functions>> = OnceLock::new();

fn functions() -> anyhow::Result<&'static Functions> {
    match FUNCTIONS.get_or_init(load) {
        Some(functions) => Ok(functions),
        None => bail!("{} is not on this machine", LIBRARY.to_string_lossy()),
    }
}

fn load() -> Option<Functions> {
    // SAFETY: glib's initialisers are sound to run at any time; the handle is never closed.
    let library = unsafe { libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOW) };
    if library.is_null() {
        return None;
    }
    let symbol = |name: &CStr| {
        // SAFETY: the handle is open, the name ends with a zero byte.
        let found = unsafe { libc::dlsym(library, name.as_ptr()) };
        (!found.is_null()).then_some(found)
    };
    macro_rules! function {
        ($name:literal, $type:ty) => {{
            let found = symbol($name)?;
            // SAFETY: the type of the field is that of the function in glib's stable interface, since 2.0 or 2.4.
            unsafe { std::mem::transmute::<Pointer, $type>(found) }
        }};
    }
    Some(Functions {
        tree_new_full: function!(c"g_tree_new_full", NewTree),
        tree_insert: function!(c"g_tree_insert", Insert),
        tree_remove: function!(c"g_tree_remove", Remove),
        tree_lookup: function!(c"g_tree_lookup", Lookup),
        tree_lookup_extended: function!(c"g_tree_lookup_extended", LookupExtended),
        tree_foreach: function!(c"g_tree_foreach", Foreach),
        malloc0: function!(c"g_malloc0", Allocate),
        free: function!(c"g_free", Destroy),
    })
}

/// Key of a mapping: what overlaps is equal.
#[repr(C)]
pub(crate) struct Interval {
    pub(crate) low: u64,
    pub(crate) high: u64,
}

/// Value of a mapping.
#[repr(C)]
pub(crate) struct Target {
    pub(crate) gpa: u64,
    pub(crate) flags: u32,
}

extern "C" fn compare_intervals(a: *const c_void, b: *const c_void, _: Pointer) -> c_int {
    // SAFETY: every key of the tree, and every key asked for, is an interval.
    let a = unsafe { &*a.cast::<Interval>() };
    // SAFETY: as above.
    let b = unsafe { &*b.cast::<Interval>() };
    if a.high < b.low {
        -1
    } else if b.high < a.low {
        1
    } else {
        0
    }
}

extern "C" fn compare_numbers(a: *const c_void, b: *const c_void, _: Pointer) -> c_int {
    c_int::from(a.addr() > b.addr()) - c_int::from(a.addr() < b.addr())
}

/// Mappings by interval, each a key and a value on glib's heap.
pub(crate) struct Mappings {
    functions: &'static Functions,
    tree: Pointer,
}

// SAFETY: glib's trees have no tie to a thread; access is exclusive through `&mut` or a lock around it.
unsafe impl Send for Mappings {}

impl Mappings {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let functions = functions()?;
        let free = Some(functions.free);
        // SAFETY: the comparison fits what is inserted, and all that is inserted comes from g_malloc0.
        let tree = unsafe { (functions.tree_new_full)(compare_intervals, std::ptr::null_mut(), free, free) };
        Ok(Self { functions, tree })
    }

    /// Inserts; false when something overlaps.
    pub(crate) fn insert(&mut self, key: Interval, value: Target) -> bool {
        // SAFETY: g_malloc0 gives zeroed memory of that size, or ends the process.
        let new_key = unsafe { (self.functions.malloc0)(size_of::<Interval>()) }.cast::<Interval>();
        // SAFETY: fresh memory of the right size; malloc's alignment is enough.
        unsafe { new_key.write(key) };
        // SAFETY: the tree is alive, the key is an interval.
        if !unsafe { (self.functions.tree_lookup)(self.tree, new_key.cast()) }.is_null() {
            // SAFETY: the key has not been given away.
            unsafe { (self.functions.free)(new_key.cast()) };
            return false;
        }
        // SAFETY: as for the key.
        let new_value = unsafe { (self.functions.malloc0)(size_of::<Target>()) }.cast::<Target>();
        // SAFETY: as for the key.
        unsafe { new_value.write(value) };
        // SAFETY: the tree takes both over and frees them with g_free.
        unsafe { (self.functions.tree_insert)(self.tree, new_key.cast(), new_value.cast()) };
        true
    }

    /// The mapping that overlaps `wanted`.
    #[inline]
    pub(crate) fn find(&self, wanted: &Interval) -> Option<(&Interval, &Target)> {
        let (mut key, mut value) = (std::ptr::null_mut(), std::ptr::null_mut());
        let asked = std::ptr::from_ref(wanted).cast();
        // SAFETY: the tree is alive, `asked` is an interval, the answers go to two local variables.
        let found = unsafe { (self.functions.tree_lookup_extended)(self.tree, asked, &mut key, &mut value) };
        if found == 0 {
            return None;
        }
        // SAFETY: every key is an interval, alive until it is removed, which takes `&mut self`.
        let key = unsafe { &*key.cast::<Interval>() };
        // SAFETY: every value is a target, alive as its key.
        let value = unsafe { &*value.cast::<Target>() };
        Some((key, value))
    }

    /// Removes what overlaps `wanted`; false when nothing does.
    pub(crate) fn remove(&mut self, wanted: &Interval) -> bool {
        // SAFETY: the tree is alive, the key is an interval.
        unsafe { (self.functions.tree_remove)(self.tree, std::ptr::from_ref(wanted).cast()) != 0 }
    }

    /// Visits all in order.
    pub(crate) fn each(&self, see: &mut dyn FnMut(&Interval, &Target)) {
        struct Visit<'a>(&'a mut dyn FnMut(&Interval, &Target));
        extern "C" fn visit(key: Pointer, value: Pointer, data: Pointer) -> c_int {
            // SAFETY: `data` is the `Visit` below, which nobody else uses meanwhile.
            let visit = unsafe { &mut *data.cast::<Visit<'_>>() };
            // SAFETY: every key is an interval.
            let key = unsafe { &*key.cast::<Interval>() };
            // SAFETY: every value is a target.
            let value = unsafe { &*value.cast::<Target>() };
            (visit.0)(key, value);
            0
        }
        let mut data = Visit(see);
        let data = std::ptr::from_mut(&mut data).cast();
        // SAFETY: the tree is alive and not changed by the visit; `data` outlives the call.
        unsafe { (self.functions.tree_foreach)(self.tree, visit, data) };
    }
}

/// Endpoints by number, each with the index of its domain.
pub(crate) struct Endpoints {
    functions: &'static Functions,
    tree: Pointer,
}

// SAFETY: as for `Mappings`.
unsafe impl Send for Endpoints {}

impl Endpoints {
    /// Endpoints of these numbers, all in domain 1.
    pub(crate) fn new(numbers: &[usize]) -> anyhow::Result<Self> {
        let functions = functions()?;
        // SAFETY: the comparison looks at the pointers themselves only; nothing is freed.
        let tree = unsafe { (functions.tree_new_full)(compare_numbers, std::ptr::null_mut(), None, None) };
        for number in numbers {
            let key = std::ptr::without_provenance_mut(*number);
            // SAFETY: the tree is alive; neither key nor value is ever followed.
            unsafe { (functions.tree_insert)(tree, key, std::ptr::without_provenance_mut(1)) };
        }
        Ok(Self { functions, tree })
    }

    /// The domain of an endpoint; 0 when there is no such endpoint.
    #[inline]
    pub(crate) fn domain(&self, number: usize) -> usize {
        // SAFETY: the tree is alive, the key is not followed.
        unsafe { (self.functions.tree_lookup)(self.tree, std::ptr::without_provenance(number)) }.addr()
    }
}
