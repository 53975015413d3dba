builtin.module {
  kv.policy @keep_all digest "57ee8a461c2a2f43" {
    %0 = kv.region "all" loc("library/keep_all.kvp":3:10)
    %1 = kv.union %0 loc("library/keep_all.kvp":3:10)
    kv.class @all loc("library/keep_all.kvp":3:5)
    kv.keep %1 for @all at [] order "any" phases [] prefill "grows" decode "grows" loc("library/keep_all.kvp":3:5)
    kv.site 0 [@all, @all] loc("library/keep_all.kvp":2:1)
    kv.site 1 [@all, @all] loc("library/keep_all.kvp":2:1)
    kv.schedule chunk 0 peek 0 window 0 page 16 loc("library/keep_all.kvp":2:1)
  } loc("library/keep_all.kvp":2:1)
} loc(unknown)
